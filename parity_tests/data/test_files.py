"""Which files a path, a folder or a glob names: what is left out and said, links, odd names, home folders."""

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from torch_ref.spec.interface import UserError
from train import command_line
from train.data.corpus import Reader, compare_identity
from train.data.feed import open_data
from train.data.options import DataOptions
from train.data.sources import FileSource
from train.data.tokenizer import load_tokenizer, train_tokenizer

LINE = b'{"text": "a line"}\n'


def write(folder, **files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def names_of(pattern, **settings):
    return list(FileSource(str(pattern), **settings).identity["files"])


def test_a_dataset_repository_gives_its_rows_and_says_the_rest(tmp_path):
    clone = write(
        tmp_path / "clone",
        **{
            "README.md": b"# A dataset card",
            "docs/usage.md": b"how to",
            "LICENSE.txt": b"law",
            "dataset_infos.json": json.dumps({"default": {"features": {}}}).encode(),
            "config.json": b'{\n  "a": 1\n}',
            "data/a.jsonl.gz": gzip.compress(LINE),
            "data/b.json": b'[{"text": "in an array"}]',
            "data/notes.txt": b"a text among rows",
            "data/c.pdf": b"%PDF",
            "script.py": b"print()",
            ".git/config.json": LINE,
        },
    )
    source = FileSource(str(clone))
    assert list(source.identity["files"]) == ["data/a.jsonl.gz", "data/b.json", "data/notes.txt"]
    kinds, left_out = source.notes
    assert kinds == "3 files: 1 .json, 1 .jsonl.gz, 1 .txt"
    assert "README.md, docs/usage.md and 0 more" not in left_out
    for said in (
        "LICENSE.txt, README.md, docs/usage.md (documentation beside data)",
        "config.json, dataset_infos.json (no rows with the text field)",
        "data/c.pdf, script.py (no kind that can be read)",
    ):
        assert said in left_out
    assert ".git" not in left_out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.json.gz", gzip.compress(LINE, mtime=0)[:-12], "b.json.gz can't be read as json.gz: EOFError"),
        ("b.json.gz", LINE, "b.json.gz can't be read as json.gz: BadGzipFile"),
        ("b.json", '{"text": "x"}\n'.encode("utf-16"), "b.json is UTF-16, not UTF-8: convert it"),
    ],
    ids=["cut short", "no archive", "UTF-16"],
)
def test_a_damaged_file_of_a_folder_is_not_left_out(name, content, said, tmp_path):
    write(tmp_path, **{"a.jsonl": LINE, name: content})
    with pytest.raises(UserError, match=f"--data: .*{said}"):
        FileSource(str(tmp_path), option="--data")


def test_the_logs_of_runs_in_a_folder_are_not_read(tmp_path):
    """A run in the folder that it reads could not go on: its own log would be another file of its data."""
    write(tmp_path, **{"a.txt": b"a text", "other/metrics.jsonl": LINE})  # not beside the files of a run
    options = DataOptions(dataset=str(tmp_path), tokenizer="bpe", vocab_size=300, seq_len=8, validation_fraction=0)
    run = tmp_path / "runs" / "x"
    first = open_data(options, run)
    assert list(first.identity["files"]) == ["a.txt", "other/metrics.jsonl"]
    write(run, **{"metrics.jsonl": LINE, "metrics.cut.jsonl": LINE, "python-docs.jsonl": LINE})
    second = open_data(options, run, resume=True)
    assert compare_identity(first.identity, second.identity) == []
    assert "runs/x/metrics.cut.jsonl, runs/x/metrics.jsonl, runs/x/python-docs.jsonl (of a run)" in second.notes[1]
    assert names_of(run / "*.jsonl") == ["metrics.cut.jsonl", "metrics.jsonl", "python-docs.jsonl"]  # named itself
    kept = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(kept | {"rules": 2}))  # of a run that began before
    assert "runs/x/metrics.jsonl" in open_data(options, run, resume=True).identity["files"]


def test_a_folder_of_markdown_is_text(tmp_path):
    assert names_of(write(tmp_path, **{"README.md": b"about", "a.md": b"more", "b.txt": b"x"})) == [
        "README.md",
        "a.md",
        "b.txt",
    ]


def test_what_is_named_is_read(tmp_path):
    write(tmp_path, **{"README.md": b"about", "a.jsonl": LINE, "b.json": LINE, "c.jsonl": LINE})
    assert names_of(tmp_path / "*") == ["README.md", "a.jsonl", "b.json", "c.jsonl"]
    assert names_of(tmp_path / "README.md") == ["README.md"]
    assert names_of(tmp_path / "[ac].*") == ["a.jsonl", "c.jsonl"]
    assert names_of(tmp_path, without=[tmp_path / "c.jsonl"]) == ["a.jsonl", "b.json"]


def test_an_empty_name_is_not_the_present_folder(tmp_path, monkeypatch):
    """As from a variable that is not set: `--dataset "$DATA"`."""
    monkeypatch.chdir(write(tmp_path, **{"a.jsonl": LINE}))
    with pytest.raises(UserError, match="--dataset: an empty name"):
        names_of("")


def test_a_folder_with_nothing_to_read_says_what_is_there(tmp_path):
    write(tmp_path, **{"b.json": b'{"body": "x"}\n', "c.pdf": b""})
    with pytest.raises(UserError, match="b.json .no rows with the text field") as error:
        FileSource(str(tmp_path))
    assert "c.pdf (no kind that can be read)" in str(error.value) and "\n" not in str(error.value)


def test_many_files_left_out_are_counted(tmp_path):
    source = FileSource(str(write(tmp_path, **{f"{number}.png": b"" for number in range(9)}, **{"a.txt": b"x"})))
    assert source.notes == ["1 file (.txt)", "left out: 0.png, 1.png, 2.png and 6 more (no kind that can be read)"]


@pytest.mark.parametrize("name", ["t [v2]", "what?", "a*b", "[x", "{y}", "100%"])
def test_glob_characters_in_real_names(name, tmp_path):
    write(tmp_path, **{f"{name}/deep/a.txt": b"x", f"{name}/b [1].txt": b"y", "t v/a.txt": b"z", "ab/a.txt": b"z"})
    assert names_of(tmp_path / name / "*.txt") == ["b [1].txt"]
    assert names_of(tmp_path / name / "**" / "*.txt") == ["b [1].txt", "deep/a.txt"]
    assert names_of(tmp_path / name / "b [1].txt") == ["b [1].txt"]
    assert names_of(tmp_path / name / "b [1].*") == ["b [1].txt"]
    assert len(names_of(tmp_path / name)) == 2


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, **{"a.txt": b"one", "closed/b.txt": b"two"})
    scandir = os.scandir

    def refuse(place):  # root may read every folder
        if os.path.basename(place) == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    source = FileSource(str(tmp_path))
    assert [file.name for file in source.files] == ["a.txt"]
    assert source.notes[1] == "left out: closed (a folder that can't be read: Permission denied)"
    with pytest.raises(UserError, match=r"left out: \. \(a folder that can't be read: Permission denied\)"):
        FileSource(str(tmp_path / "closed"))


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path, **{"elsewhere/a.txt": b"x", "corpus/b.txt": b"y"})
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "linked again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "corpus" / "c.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    source = FileSource(str(tmp_path / "corpus"))
    assert list(source.identity["files"]) == ["b.txt", "c.txt", "linked/a.txt"]
    assert "linked again, loop (a link to a folder searched already)" in source.notes[1]
    assert "gone.txt (a link to nothing)" in source.notes[1]
    assert names_of(tmp_path / "corpus", former=True) == ["b.txt", "c.txt"]
    assert source.notes[2].startswith("1 of these files are others once more"), "c.txt is linked/a.txt"
    source = FileSource(str(tmp_path / "corpus" / "**" / "*.txt"))
    again = len(source.files) - 2
    assert again > 30 and source.notes[1].startswith(f"{again} of these files are others once more, through links")
    assert len(FileSource(str(tmp_path / "elsewhere")).notes) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_a_home_folder_in_every_path(home):
    write(home, **{"texts/a.txt": b"at home"})
    train_tokenizer(["at home"], 300).save(home / "tokenizer")
    assert [document.text for document in Reader(FileSource("~/texts/*.txt"))] == ["at home"]
    assert load_tokenizer("~/tokenizer").vocab_size > 256
    (home / "settings.toml").write_text('run_dir = "~/runs/x"\nsteps = 7\n')
    options = command_line.parse(["--config=~/settings.toml"], "test")
    assert (options.steps, options.run_dir, options.config) == (7, home / "runs/x", home / "settings.toml")
    assert command_line.parse(["--run-dir=~/runs/y"], "test").run_dir == home / "runs/y"


def test_a_home_folder_given_to_the_other_commands(home, capsys):
    from train import convert, evaluate, generate, plot, runs

    for command, arguments in [
        (plot, ["~/run"]),
        (runs, ["~/run"]),
        (convert, ["~/run", "~/x", "--to", "neutral"]),
        (evaluate, ["~/run", "--data", "~/texts"]),
        (generate, ["~/run", "--prompt", "x"]),
    ]:
        (home / "texts").mkdir(exist_ok=True)
        (home / "texts" / "a.txt").write_text("x")
        assert command.main(arguments) == 2
        assert f"{Path(home)}/run" in capsys.readouterr().err
