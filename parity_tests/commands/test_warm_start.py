"""A small Llama, trained here for a few seconds, becomes this model: every stage, what comes out, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import errno
import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from torch_ref.spec.config import PRESETS
from torch_ref.spec.huggingface import import_folder
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import parameter_table
from torch_ref.spec.storage import read_json
from train.data.packing import rows_of
from train.data.python_docs import python_documents
from train.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

torch = pytest.importorskip("torch", reason="the warm start fits with torch")
transformers = pytest.importorskip("transformers", reason="the old model is read with transformers")

from parity_tests.support.warm import COMPUTE, SMALL, largest_error, llama_config, torch_logits, torch_model  # noqa: E402
from train.warm_start import __main__ as warm_start  # noqa: E402
from train.warm_start import stages as warm_stages  # noqa: E402
from train.warm_start.options import WarmStartOptions  # noqa: E402
from train.warm_start.report import print_tables  # noqa: E402
from train.warm_start.teacher import Teacher, check_tokenizer, read_teacher  # noqa: E402

ARGUMENTS = (
    "--preset small-warm --seq-len 64 --fit-rows 32 --fit-steps 25 --distill-steps 40 --distill-batch 4 "
    "--distill-learning-rate 1e-3 --measure-tokens 8000 --measure-lengths 64 128"
).split()

QUICK = (
    "--fit-rows 4 --fit-steps 0 --distill-steps 2 --distill-batch 1 --measure-tokens 400 --measure-lengths 64"
).split()


def arguments_for(teacher: Path, out: Path) -> list[str]:
    return ["--from", str(teacher), "--dataset", str(teacher / "text.jsonl"), "--out", str(out), *ARGUMENTS]


@pytest.fixture(scope="module", autouse=True)
def preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small-warm", SMALL)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Folder of a Llama that has learned a little English, and to attend to what came before: without that, replacing
    its attention would change nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    texts = [text for _, text in itertools.islice(python_documents(), 80)]
    tokenizer = train_tokenizer(texts, SMALL.vocab_size)
    tokenizer.save(folder)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = torch.tensor([number for text in texts for number in tokenizer.encode(text)])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    for step in range(400):
        start = torch.randint(len(tokens) - 65, (8,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([tokens[at : at + 64] for at in start])
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        warmup.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def warm(teacher, tmp_path_factory) -> Path:
    """Folder that the whole program made of it."""
    folder = tmp_path_factory.mktemp("warm") / "model"
    assert warm_start.main(arguments_for(teacher, folder)) == 0
    return folder


# The whole path


def test_each_stage_comes_nearer_to_the_old_model(warm):
    report = read_json(warm / "warm_start.json")
    losses = {stage: next(iter(by_text.values())) for stage, by_text in report["losses"].items()}
    assert list(losses) == ["original", "converted", "fitted", "distilled", "experts"]
    for length in ("64", "128"):
        gap = {stage: losses[stage][length] - losses["original"][length] for stage in losses}
        assert losses["original"][length] < 5.5 < np.log(SMALL.vocab_size)
        assert 0 < gap["distilled"] < gap["fitted"] < gap["converted"]
        assert gap["experts"] == pytest.approx(gap["distilled"], abs=1e-5)
    assert all(layer["converted"] < 0.6 for layer in report["layers"])
    # Each layer is judged on rows of its own, so on these held-out rows a single one may come out a little worse.
    converted, fitted = (sum(layer[stage] for layer in report["layers"]) for stage in ("converted", "fitted"))
    assert fitted < converted
    divergences = report["distillation"]
    assert np.mean(divergences[-5:]) < np.mean(divergences[:3])
    assert max(report["expert_load"]) < 2
    assert (warm / "warm_start.png").read_bytes().startswith(b"\x89PNG")
    assert not warm.with_name(warm.name + ".partial").exists()


def test_the_same_logits_in_flax_torch_and_transformers(warm):
    config, arrays = import_folder(warm)
    assert config == SMALL
    values = [(row, arrays[row.name]) for row in parameter_table(config)]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.max_position)).astype(np.int32)
    ours = torch_logits(torch_model(config, values), tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(warm).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    assert largest_error(ours, theirs) < 1e-5

    pytest.importorskip("jax", reason="Flax is not installed")
    import jax.numpy as jnp

    from flax_model.trees import merge
    from flax_model.values import from_values

    flax = merge(*from_values(config, values, np.float32))
    flax_logits = np.asarray(flax.logits(flax(jnp.asarray(tokens), COMPUTE).hidden))
    assert largest_error(flax_logits, ours) < 1e-5


def test_the_tokenizer_comes_with_the_model(warm, teacher):
    text = "The quick brown fox, 1984."
    ids = load_tokenizer(str(teacher)).encode(text)
    assert load_tokenizer(str(warm)).encode(text) == ids
    assert transformers.AutoTokenizer.from_pretrained(warm).encode(text, add_special_tokens=False) == ids


def test_training_that_starts_from_it_takes_its_sizes_and_its_tokenizer(warm):
    from train.command_line import parse

    options = parse(["--init-from", str(warm), "--seq-len", "64"], "train")
    assert options.model == SMALL
    assert options.tokenizer == str(warm)
    assert parse(["--init-from", str(warm), "--seq-len", "64", "--tokenizer", "bpe"], "train").tokenizer == "bpe"


def test_an_interrupted_conversion_goes_on_with_the_next_layer(teacher, warm, tmp_path, monkeypatch):
    out = tmp_path / "model"
    arguments = arguments_for(teacher, out)
    layers = []

    def fit(*positional):
        layers.append(len(layers))
        if len(layers) == 2:
            raise KeyboardInterrupt
        return fit_attention(*positional)

    fit_attention = warm_stages.fit_attention
    monkeypatch.setattr(warm_stages, "fit_attention", fit)
    assert warm_start.main(arguments) == 130
    assert not out.exists()
    assert warm_start.main(arguments) == 0
    assert len(layers) == 3, "the first layer was fitted again"
    for row, value in zip(parameter_table(SMALL), import_folder(out)[1].values(), strict=True):
        np.testing.assert_array_equal(value, import_folder(warm)[1][row.name], err_msg=row.name)


def test_a_disk_too_full_for_the_picture_leaves_no_folder_without_it(teacher, tmp_path, monkeypatch, capsys):
    """And whoever goes on with other lengths gets the losses at those."""
    out = tmp_path / "model"
    arguments = [*arguments_for(teacher, out), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", stopping(OSError(errno.ENOSPC, "No space left")))
        assert warm_start.main(arguments) == 2
    assert not out.exists()
    assert "warm_start.png: no space left" in capsys.readouterr().err.splitlines()[-1]
    assert warm_start.main([*arguments, "--measure-lengths", "128"]) == 0
    for by_text in read_json(out / "warm_start.json")["losses"].values():
        assert [list(by_length) for by_length in by_text.values()] == [["128"]]
    assert (out / "warm_start.png").exists() and (out / "model.safetensors").exists()
    assert [left.name for left in tmp_path.iterdir()] == ["model"]


def test_a_distillation_goes_on_in_its_own_precision_only(teacher, tmp_path, monkeypatch):
    out = tmp_path / "model"
    monkeypatch.setattr(warm_stages, "mlp_inputs", stopping(KeyboardInterrupt()))  # when the distilled is measured
    losses = []
    for precision in ("float32", "bfloat16"):
        assert warm_start.main([*arguments_for(teacher, out), *QUICK, "--compute", precision]) == 130
        losses.append(read_json(tmp_path / "model.partial" / "losses-distilled.json")["losses"])
    assert losses[0] != losses[1]


def stopping(stop: BaseException):
    def function(*_, **__):
        raise stop

    return function


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("2", "diverged by step 2: lower --distill-learning-rate"),
        ("1", "the loss of the distilled model is not finite"),
    ],
)
def test_a_distillation_that_diverges_is_no_model(teacher, tmp_path, capsys, steps, said):
    flags = ["--distill-learning-rate", "1e30", "--distill-steps", steps]
    assert warm_start.main([*arguments_for(teacher, tmp_path / "model"), *QUICK, *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "model").exists()


@pytest.mark.parametrize("text_weight", [0.0, 0.4, 1.0])
def test_the_distillations_gradient_is_that_of_the_divergence(text_weight):
    from train.warm_start.fit import _divergence

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, wanted, ours, theirs = draw(2, 300, 8).requires_grad_(), draw(2, 300, 8), draw(40, 8), draw(40, 8)
    following = torch.randint(40, (2, 300), generator=generator)
    text = torch.nn.functional.one_hot(following, 40).double()
    target = (1 - text_weight) * (wanted @ theirs.T).softmax(-1) + text_weight * text
    log_q = (hidden @ ours.T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, target, reduction="none").sum(-1).mean()
    expected.backward()
    seen = wanted if text_weight < 1 else None
    divergence, gradient = _divergence(hidden.detach(), ours, seen, theirs, following, text_weight)
    assert divergence == pytest.approx(expected.item(), rel=1e-12)
    assert largest_error(gradient.numpy(), hidden.grad.numpy()) < 1e-12


@pytest.mark.parametrize("rate", ["10", "1e30"])  # of the second, nothing is a number any more
def test_a_fit_that_loses_leaves_the_layer_as_converted(teacher, tmp_path, rate):
    out = tmp_path / "model"
    flags = ["--fit-learning-rate", rate, "--fit-steps", "5", "--distill-steps", "0", "--measure-lengths", "64"]
    assert warm_start.main([*arguments_for(teacher, out), *flags]) == 0
    for layer in read_json(out / "warm_start.json")["layers"]:
        assert layer["fitted"] == layer["converted"]


def test_no_more_is_measured_than_asked_for():
    held_out = SimpleNamespace(validation=rows_of(range(256), 64))
    options = WarmStartOptions(source="old", out=Path("new"), measure_tokens=100, measure_lengths=(8,))
    (by_length,) = warm_stages.Stages(options, SMALL, None, None, held_out, None, None).texts().values()
    assert (by_length[8].targets >= 0).sum() == 100


def test_few_held_out_and_few_fit_rows_are_enough(teacher, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    lines = (teacher / "text.jsonl").read_text().splitlines()[:12]
    text.write_text("".join(json.dumps({"text": json.loads(line)["text"][:100]}) + "\n" for line in lines))
    flags = ["--dataset", str(text), "--fit-rows", "1", "--fit-steps", "1"]
    calibrate, rows = warm_stages.calibrate, []
    monkeypatch.setattr(warm_stages, "calibrate", lambda *given: rows.append(len(given[2])) or calibrate(*given))
    assert warm_start.main([*arguments_for(teacher, tmp_path / "model"), *QUICK, *flags]) == 0
    assert rows == [1, 1]


@pytest.mark.parametrize("mlp_rate", [0.0, 1e-3])
def test_the_distillation_trains_what_has_a_rate(teacher, tmp_path, mlp_rate):
    from torch_ref.model import Model
    from torch_ref.spec.parameters import initial_values
    from train.warm_start.fit import AdamWSettings, Distillation, distill

    config, weights, _ = read_teacher(str(teacher))
    dense = dataclasses.replace(SMALL, first_k_dense=SMALL.num_layers, intermediate_size=SMALL.moe_intermediate_size)
    model = Model(dense).load_values(initial_values(dense, 0))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = rows_of(np.random.default_rng(0).integers(1, SMALL.vocab_size, 4 * 32 + 1).tolist(), 32)
    settings = Distillation(AdamWSettings(2, 2, 1e-3), mlp_rate, text_weight=1.0)
    losses = distill(model, Teacher(config, weights), rows, settings, COMPUTE, tmp_path / "state.pt")
    assert len(losses) == 2 and all(np.isfinite(losses))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {
        name for name in before if "attention" in name or "norm" in name or ("mlp" in name and mlp_rate > 0)
    }


def test_brackets_in_a_texts_name_are_in_the_tables_column():
    console = Console(file=io.StringIO(), width=100)
    print_tables({"losses": {"original": {"news[lang=en].jsonl": {"64": 2.5}}}, "layers": []}, console)
    assert "news[lang=en].jsonl" in console.file.getvalue()


# Refusals


def test_a_tokenizer_is_compared_by_its_entries(teacher):
    own = load_tokenizer(str(teacher))
    definition = json.loads(own.definition)
    check_tokenizer(own, TextTokenizer(json.dumps(definition), "copy"))
    other = copy.deepcopy(definition)
    vocabulary = other["model"]["vocab"]
    a, b = (token for token, number in vocabulary.items() if number in (70, 71))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    with pytest.raises(UserError, match="--tokenizer other: entry 70 is "):
        check_tokenizer(own, TextTokenizer(json.dumps(other), "other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "no/such/folder"], "no such folder"),
        (["--from", "absent.gguf"], "no such file"),
        (["--preset", "huge"], "--preset huge: there are"),
        (["--diversity", "1.5"], "--diversity 1.5"),
        (["--seq-len", "4096"], "--seq-len 4096: must be from 2 to"),
        (["--fit-rows", "many"], "fit-rows"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--fit-learning-rate", "-1"], "--fit-learning-rate -1.0: must be at least 0"),
        (["--fit-learning-rate", "nan"], "--fit-learning-rate nan: must be at least 0"),
        (
            ["--also-measure", "python-docs"],
            "--also-measure python-docs: is measured already (--dataset, or named twice)",
        ),
        (["--distill-learning-rate", "0"], "--distill-learning-rate 0: with --distill-mlp-learning-rate 0"),
    ],
)
def test_mistakes_end_in_one_line(teacher, tmp_path, capsys, arguments, message):
    given = ["--from", str(teacher), "--out", str(tmp_path / "new"), "--preset", "small-warm", "--seq-len", "64"]
    given += ["--measure-lengths", "64"]
    assert warm_start.main([*given, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and message in said and "\n" not in said


def test_the_current_folder_is_refused(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in (Path("."), tmp_path):
        assert warm_start.main(arguments_for(teacher, out)) == 2
        assert capsys.readouterr().err == f"error: --out {out}: is the current folder; name a new one\n"


def test_a_text_to_measure_on_without_text_is_refused(teacher, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"other": 1}\n')
    arguments = [*arguments_for(teacher, tmp_path / "model"), "--also-measure", str(tmp_path / "other.jsonl")]
    assert warm_start.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: --also-measure {tmp_path / 'other.jsonl'}: no text in there"


def test_a_folder_in_use_and_a_partial_one_of_another_kind_are_refused(teacher, warm, tmp_path, monkeypatch, capsys):
    assert warm_start.main(arguments_for(teacher, warm)) == 2
    assert "exists already" in capsys.readouterr().err

    monkeypatch.setattr(warm_stages, "fit_attention", stopping(KeyboardInterrupt()))
    arguments = arguments_for(teacher, tmp_path / "model")
    assert warm_start.main(arguments) == 130
    assert warm_start.main([*arguments, "--fit-rows", "16"]) == 2
    assert "of other options; delete that folder" in capsys.readouterr().err
