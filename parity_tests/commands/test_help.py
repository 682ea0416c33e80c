"""Each option of each command is explained by a line that can be read by itself; the pages name only what there is."""

import argparse
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import tyro

from train.command_line import field_docstrings
from train.plan.__main__ import main as plan
from train.run.options import GROUPS

COMMANDS = {
    "train.flax_main": ("flax", "jax"),
    "torch_ref.train": ("torch",),
    "train.generate": (),
    "train.evaluate": (),
    "train.convert": (),
    "train.plot": (),
    "train.runs": (),
    "train.bench.__main__": (),
    "train.plan.__main__": (),
    "train.bench.gpu_check": (),
    "train.warm_start.__main__": ("torch",),
    "parity_tests.report": ("flax", "torch"),
    "parity_tests.check": ("flax", "torch"),
    "parity_tests.compare": (),
    "parity_tests.harness.endurance": (),
    "parity_tests.harness.kills": (),
    "parity_tests.harness.write_faults": (),
}


class Shown(Exception):
    """What `--help` would show: lines of help by option."""


def of_dataclass(options: type) -> dict[str, str]:
    """Lines of help of a dataclass and of the dataclasses in it, as tyro shows them."""
    lines = {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.type):
            lines |= of_dataclass(field.type)
        else:
            owner = next(base for base in options.__mro__ if field.name in base.__dict__.get("__annotations__", {}))
            lines[field.name] = field_docstrings(owner).get(field.name, "")
    return lines


def shown_by(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    def by_argparse(self, parser, *_):
        actions = [action for action in parser._actions if action is not self]
        raise Shown({action.dest: (action.help or "") % {"default": action.default} for action in actions})

    def by_tyro(options, **_):
        raise Shown(of_dataclass(options))

    monkeypatch.setattr(argparse._HelpAction, "__call__", by_argparse)
    monkeypatch.setattr(tyro, "cli", by_tyro)
    with pytest.raises(Shown) as shown:
        importlib.import_module(command).main(["--help"])
    return shown.value.args[0]


def why_not_a_sentence(line: str) -> str | None:
    """A rule that a machine can hold a line of help to, or None if it holds."""
    if not line[:1].isupper():
        return "begins without a capital"
    if not line.endswith("."):
        return "ends without a period"
    if len(line.split()) < 4:
        return "is too short to say what is meant"
    if re.match(r"(Of|Its|Their|On|By)\b", line):
        return "leans on a word that is not there"
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_by_itself(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in COMMANDS[command]:
        pytest.importorskip(package)
    lines = shown_by(command, monkeypatch)
    assert lines
    assert {name: f"{line!r} {why}" for name, line in lines.items() if (why := why_not_a_sentence(line))} == {}


@pytest.mark.parametrize(
    "line", ["", "Of samples.", "Peak.", "a new folder to write", "Its project at Weights & Biases."]
)
def test_the_rule_refuses_what_cannot_stand_alone(line: str) -> None:
    assert why_not_a_sentence(line)


REPOSITORY = Path(__file__).parents[2]
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
LAUNCHED = re.compile(r"(?:python|torchrun .*) -m (?P<command>(?:train|torch_ref|parity_tests)\.[\w.]+)(?P<words>.*)")
ENTRIES = {f"train.{name}": f"train.{name}.__main__" for name in ("bench", "plan", "warm_start")}
MORE_OPTIONS = {"train.warm_start": {"from"}, "train.bench": {"gpu_check"}}  # `from` is no name in Python
OTHERS = """
cache_clear gpus_per_task help include_path model model_args nnodes no_deps nproc_per_node outfile outtype quota
rdzv_backend rdzv_endpoint tasks
"""
"""Options of pip, pytest, srun, torchrun, lm_eval, llama.cpp's converter, and of a harness that needs root."""


def command_lines(page: Path) -> list[tuple[str, str]]:
    """Commands in a page's blocks and spans of code, continued lines joined, with what follows their name."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    code = re.findall(r"^```\w*\n.*?^```$|^(?: {4}[^\n]*\n)+|`[^`\n]+`", text, re.MULTILINE | re.DOTALL)
    lines = (line.strip("`").partition(" #")[0] for block in code for line in block.splitlines())
    return [(found["command"], found["words"]) for line in lines if (found := LAUNCHED.search(line))]


def test_commands_of_the_pages_have_the_options_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(page, *line) for page in PAGES for line in command_lines(page)]
    assert len(named) > 80
    training = {name for group in GROUPS for name in of_dataclass(group)} | {"no_scan_layers"}
    known = {"train.flax_main": training, "torch_ref.train": training, "train.command_line": set()}
    wrong = []
    for page, command, words in named:
        entry = "train.bench.gpu_check" if "--gpu-check" in words else ENTRIES.get(command, command)
        if entry not in known:
            for package in COMMANDS[entry]:
                pytest.importorskip(package)
            with monkeypatch.context() as patch:
                known[entry] = set(shown_by(entry, patch)) | MORE_OPTIONS.get(command, set())
            known[entry] |= training if command == "train.plan" else set()
        options = {name.replace("-", "_") for name in re.findall(r"(?<!\S)--([a-z][\w-]*)", words)}
        wrong += [f"{page.name}: {command} --{name}" for name in options - known[entry]]
    assert wrong == []
    there = set().union(*known.values(), OTHERS.split())
    for page in PAGES:
        options = re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8"))
        wrong += [f"{page.name}: --{name}" for name in options if name.replace("-", "_") not in there]
    assert wrong == []


def test_plans_of_the_pages_can_be_made(capsys: pytest.CaptureFixture) -> None:
    plans = {words for page in PAGES for command, words in command_lines(page) if command == "train.plan"}
    plans = [words.replace("--compile", "").split() for words in plans if "--config" not in words]
    assert len(plans) >= 5
    assert [words for words in plans if plan(words) != 0] == [], capsys.readouterr().err


def anchors(page: Path) -> set[str]:
    """Names by which a page's headings can be linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_files_of_the_pages_are_there() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or anchor and anchor not in anchors(target):
                missing.append(f"{page.name}: {link}")
        for name in re.findall(r"`((?:train|torch_ref|flax_model|parity_tests|docs|\.ci)/[^`\s:{]+)", text):
            if not list(REPOSITORY.glob(name)) and not name.endswith("/x.py"):
                missing.append(f"{page.name}: {name}")
    assert missing == []
