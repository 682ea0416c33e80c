"""`python -m parity_tests.check`: a right model passes, and a fault in any of the three frameworks, in an exported
folder, or in training on, is found and named."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("torch", reason="the check runs the model in torch")
pytest.importorskip("flax", reason="the check runs the model in Flax")
pytest.importorskip("transformers", reason="the check runs the model in transformers")

from parity_tests import check
from parity_tests.harness.judge import mean_loss
from parity_tests.support.trained import MODEL, trained_folder, untied_values
from torch_ref.spec.huggingface import changed_tensors, export_folder, key_of, our_name
from torch_ref.spec.interface import TrainingState
from torch_ref.spec.parameters import parameter_table
from torch_ref.train import main as train
from train.state.card import VERDICT, model_card


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """With a model card whose verdict is still open."""
    folder = trained_folder(tmp_path_factory.mktemp("exported"))
    (folder / "README.md").write_text(model_card(TrainingState(MODEL, {}), None))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of torch, small and in float32, after its third step."""
    folder = tmp_path_factory.mktemp("run") / "small"
    sizes = {"hidden-size": 32, "num-layers": 2, "vocab-size": 300, "kv-lora-rank": 8, "moe-intermediate-size": 32}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags += "--device cpu --seq-len 32 --batch-size 4 --steps 3 --extended-steps 0 --validation-rows 4".split()
    assert train(["--preset", "tiny", *flags, "--run-dir", str(folder), "--no-tensorboard"]) == 0
    return folder


def said(capsys, *arguments: object) -> tuple[int, str]:
    """The exit code, and the verdict."""
    code = check.main([*map(str, arguments), "--seq-len", "40"])
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()[-1]


def test_a_right_model_passes_and_its_card_says_so(exported, capsys, monkeypatch):
    decoded, original = [], check._decoding
    monkeypatch.setattr(check, "_decoding", lambda *arguments: decoded.extend(original(*arguments)) or decoded)
    code, verdict = said(capsys, exported)
    assert code == 0 and verdict.startswith("Yes, to rounding. ")
    assert [each.where.partition(",")[0] for each in decoded] == ["torch", "flax", "transformers"]
    assert all(re.search(r", of [1-9]\d* judged of 24$", each.where) for each in decoded), decoded
    page = (exported / "parity/index.html").read_text()
    assert (
        "output, in the order of the forward pass" in page
        and "transformers against torch" in page
        and "the Python docum" in page
    )
    assert "**Yes, to rounding.**" in (exported / "README.md").read_text()
    content = json.loads((exported / VERDICT).read_text())
    assert (content["passed"], content["step"]) == (True, 0)


FAULTS = {
    "Flax": (
        lambda: mock.patch("flax_model.attention.ATTENTION_PATHS", scaled_paths()),
        "trace, float32, .*: layers.0.attention.attend off by",
    ),
    "torch": (
        lambda: mock.patch("torch_ref.layers.F.silu", lambda x: x),
        "trace, float32, .*: layers.0.mlp.down_proj off by",
    ),
    "transformers": (
        lambda: mock.patch(
            "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm.__init__", coarse_norm
        ),
        "transformers trace, float32, .*: layers.0.input_norm off by",
    ),
    "router": (
        lambda: mock.patch("flax_model.moe.top_k", without_the_best),
        "choices, float32, .*: layers.1.mlp.router: 80 of 80 tokens differ, of them beyond the score error off by",
    ),
    "cache": (lambda: scaled_decoding(), "decode, float32, .*: flax, of .* judged of 24 off by"),
}


def scaled_paths() -> dict:
    from flax_model.attention import ATTENTION_PATHS

    return {name: lambda *args, p=path, **more: 1.01 * p(*args, **more) for name, path in ATTENTION_PATHS.items()}


def without_the_best(scores, k):
    import jax

    return jax.lax.top_k(scores, k + 1)[1][:, 1:]


@contextmanager
def scaled_decoding():
    """Attention to the cache alone, in programs that are compiled for it."""
    from flax_model import generate

    original = generate.attend_latents

    def scaled(*arguments):
        out, cache = original(*arguments)
        return 3 * out, cache

    generate._run.clear_cache()
    with mock.patch.object(generate, "attend_latents", scaled):
        yield
    generate._run.clear_cache()


def coarse_norm(self, size, eps=1e-6):
    import torch

    torch.nn.Module.__init__(self)
    self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(size)), 1e-2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_framework_is_found_where_it_is(exported, tmp_path, capsys, fault):
    plant, place = FAULTS[fault]
    with plant():
        code, verdict = said(capsys, exported, "--out", tmp_path)
    assert code == 1
    assert re.search(f"^No. They part first here: ({place})", verdict), verdict


KEYS = (
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.2.self_attn.q_a_layernorm.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.0.self_attn.kv_b_proj.weight",  # the copies of a group then differ
    "lm_head.weight",  # no longer the embedding
)


def change(source: Path, target: Path, key: str) -> Path:
    """A copy of an exported folder, in which one weight is off by 1e-3."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[key].flat[3] += 1e-3
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("key", KEYS)
def test_an_exported_folder_with_a_changed_weight_is_not_what_was_exported(exported, tmp_path, key):
    assert not changed_tensors(exported)
    assert changed_tensors(change(exported, tmp_path / "changed", key)) == [key]
    (measurement,) = check.changed_weights(tmp_path / "changed")
    assert not measurement.passed and our_name(key) in measurement.where


@pytest.mark.parametrize("key", [KEYS[0], KEYS[3]])
def test_the_command_names_the_changed_weight(exported, tmp_path, capsys, key):
    code, verdict = said(capsys, change(exported, tmp_path / "changed", key))
    assert code == 1 and f"export, float32, {tmp_path}/changed: {our_name(key)}, changed in {key}. " in verdict


def test_another_exported_folder_is_the_one_that_is_compared(exported, tmp_path, capsys):
    """It, not the model's own, is opened and gets the verdict; `train.convert` is not to take it for the model's."""
    model = shutil.copytree(exported, tmp_path / "model", ignore=shutil.ignore_patterns("parity"))
    other = change(model, tmp_path / "other", KEYS[0])
    before = (model / "README.md").read_text()

    def measure(checked, folder, device, platform, report, say):
        report.add(check.check_export(checked, folder), say)

    with mock.patch.object(check, "measure", measure):
        code, verdict = said(capsys, model, "--exported", other)
    assert code == 1 and f"{other}: {our_name(KEYS[0])}, changed in {KEYS[0]}." in verdict
    assert "**No.**" in (other / "README.md").read_text() and (model / "README.md").read_text() == before
    assert not (model / VERDICT).exists() and not (other / VERDICT).exists()


def test_a_folder_that_is_not_the_runs_any_more(run, tmp_path, capsys):
    """Also one that keeps no checksums: what it holds is compared with the run's own weights."""
    from train.convert import convert

    convert(run, tmp_path / "exported", "transformers")
    code, verdict = said(capsys, run, "--exported", tmp_path / "exported")
    assert code == 0, verdict
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    folder = change(tmp_path / "exported", tmp_path / "changed", key)
    sidecar = json.loads((folder / "smol_deepseek.json").read_text())
    (folder / "smol_deepseek.json").write_text(json.dumps({"model": sidecar["model"]}))
    code, verdict = said(capsys, run, "--exported", folder)
    assert code == 1 and ": layers.1.mlp.experts.up_proj off by" in verdict


def test_names_of_tensors_lead_back_to_the_table():
    for row in parameter_table(MODEL):
        key = key_of(row.name)
        if ".experts." in key:
            key = key.replace("experts.", "experts.2.") + ".weight"
        assert our_name(key) == row.name


def test_choices_that_rounding_makes_are_no_fault(tmp_path, capsys, monkeypatch):
    """Two experts' rows differ by less than float32 resolves: choices differ, and what follows is compared with the
    same choices forced upon all."""
    from parity_tests.harness import ladder

    config = replace(MODEL, num_layers=2, first_k_dense=0)

    def values():
        for row, value in untied_values(config):
            if row.name.endswith("router.weight"):
                value[2] = value[1] * (1 + 3e-8 * np.random.default_rng(0).standard_normal(value.shape[1]))
            if not row.trainable:
                value[1:3] = 0.3
            yield row, value

    alike = []
    original = ladder.choose_alike
    monkeypatch.setattr(ladder, "choose_alike", lambda *pair: alike.append(original(*pair)) or alike[-1])
    export_folder(tmp_path / "ties", config, values())
    code, verdict = said(capsys, tmp_path / "ties", "--rows", 8)
    assert code == 0, verdict
    assert not all(alike), "no choice differed: the test shows nothing"


def test_training_on_is_compared(run, tmp_path, capsys):
    code, verdict = said(capsys, run, "--steps", 2, "--out", tmp_path)
    assert code == 0, verdict
    assert "2 training steps" in (tmp_path / "index.html").read_text()
    with mock.patch("torch_ref.backend.global_norm", lambda gradients: 1e-3 * sum(g.sum() ** 2 for g in gradients)):
        code, verdict = said(capsys, run, "--steps", 2, "--out", tmp_path)
    assert code == 1 and "training run, float64" in verdict and "gradient norm, step 4" in verdict


def test_training_on_keeps_attention_within_documents_as_the_run_did(tmp_path, capsys):
    texts, run = tmp_path / "texts.jsonl", tmp_path / "run"
    texts.write_text("".join(json.dumps({"text": f"the word {n}"}) + "\n" for n in range(200)))
    flags = "--preset tiny --device cpu --hidden-size 32 --num-layers 1 --vocab-size 300 --seq-len 32 --batch-size 2"
    flags += f" --steps 2 --extended-steps 0 --dataset {texts} --run-dir {run} --no-tensorboard --document-mask"
    assert train(flags.split()) == 0
    code, verdict = said(capsys, run, "--steps", 1)
    assert code == 0, verdict
    with mock.patch("torch_ref.model.document_numbers", lambda tokens, separator: 0 * tokens):
        code, verdict = said(capsys, run, "--steps", 1)
    assert code == 1 and "training run, float64" in verdict and "loss, step 3" in verdict, verdict


def test_the_runs_own_dtype_is_measured_too(run, tmp_path, capsys):
    meta = {"options": {"dtype": "bfloat16"}}
    checked = check.open_model(run, None, None, [], 1, 32)
    assert checked.dtypes == ["float32"] and checked.text == "the run's held-out rows"
    assert replace(checked, state=replace(checked.state, meta=meta)).dtypes == ["float32", "bfloat16"]
    with mock.patch.object(check, "open_model", lambda *_: replace(checked, state=replace(checked.state, meta=meta))):
        code, verdict = said(capsys, run, "--out", tmp_path)
    assert code == 0, verdict
    assert "bfloat16" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere: no such file or folder"),
        (["{exported}", "--steps", "1"], "error: --steps: .* is no training state in a run folder"),
        (["{exported}", "--steps", "-3"], "error: --steps -3: must be at least 1"),
        (["{exported}", "--rows", "0"], "error: --rows, --seq-len"),
        (["{run}", "--exported", "{exported}"], "error: --exported: .* is of another model than .*run"),
        (["{run}", "--exported", "nowhere"], "error: nowhere"),
        (["{run}", "--data", "nothing*.txt"], "error: .*nothing"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(exported, run, tmp_path, capsys, arguments, message):
    filled = [each.format(exported=exported, run=run) for each in arguments]
    with mock.patch.object(check, "measure") as measure:
        code, verdict = said(capsys, *filled, "--out", tmp_path)
    assert code == 2 and re.match(message, verdict), verdict
    assert not measure.called


def test_mean_loss_is_that_of_scored_targets():
    import torch

    draw = np.random.default_rng(0)
    logits, targets = draw.standard_normal((2, 5, 7)).astype(np.float32), draw.integers(0, 7, (2, 5))
    targets[0, 2:] = -1
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double().flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1
    )
    assert mean_loss(logits, targets) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "dtype", "error", "passes"),
    [
        (1, "float32", 1.1e-5, False),
        (11, "float32", 1.1e-5, True),
        (11, "float32", 2.1e-5, False),
        (11, "float64", 1.1e-12, False),
    ],
)
def test_modules_of_a_deep_model_carry_the_errors_of_the_layers_before_them(layer, dtype, error, passes):
    """In float32; float64 has room enough."""
    from parity_tests.harness.cases import Case
    from parity_tests.harness.ladder import compare_outputs
    from parity_tests.harness.measure import Outcome
    from torch_ref.spec.config import ComputeConfig

    case = Case("deep", replace(MODEL, num_layers=12), ComputeConfig(dtype=dtype), ComputeConfig(dtype=dtype))
    value, name = np.ones((1, 2, 3), dtype), f"layers.{layer}.mlp"
    right = Outcome(0, 1, 0, value[None], value, np.zeros(0, int), {}, {name: value})
    measured = compare_outputs(case, replace(right, trace={name: value + np.asarray(error, dtype)}), right)
    assert [each.rung for each in measured] == ["trace", "hidden", "logits", "KL", "loss"]
    assert measured[0].passed == passes and all(each.passed for each in measured[1:])


@pytest.mark.parametrize(("margin", "unexplained"), [(0.9e-3, 0), (1.1e-3, 1)])
def test_choices_may_differ_within_the_error_of_the_scores(margin, unexplained):
    """1e-3 here. The margin is that of score and bias; after a router that chose differently none is compared."""
    from parity_tests.harness.cases import Case
    from parity_tests.harness.ladder import compare_choices
    from parity_tests.harness.measure import Outcome
    from torch_ref.spec.config import ComputeConfig

    assert MODEL.num_experts_per_tok == 2
    routers = [f"layers.{layer}.mlp.router" for layer in (1, 2, 3)]
    scores = np.tile([0.9, 0.5, 0.3, 0.1], (5, 1))
    biases = {f"{name}.balance_bias": np.array([0, 0, 0.2 - margin, 0]) for name in routers}
    chosen, other = np.tile([0, 1], (5, 1)), np.tile([1, 0], (5, 1))
    flax = {f"{name}.{part}": value for name in routers for part, value in (("scores", scores), ("chosen", chosen))}
    torch = {name: value + 1e-3 if name.endswith("scores") else other for name, value in flax.items()}
    for name in routers[1:]:
        torch[f"{name}.chosen"] = other.copy()
        torch[f"{name}.chosen"][3] = [2, 0]
    right = Outcome(0, 1, 0, np.ones(1), np.ones(1), np.zeros(0, int), {})
    case = Case("made up", MODEL, ComputeConfig(), ComputeConfig())
    found = compare_choices(case, replace(right, trace=torch), replace(right, trace=flax), biases)
    assert [(each.where.partition(" of ")[0], each.error) for each in found] == [
        ("layers.1.mlp.router: 0", 0),
        ("layers.2.mlp.router: 1", unexplained),
    ]
    assert [each.passed for each in found] == [True, not unexplained]


def test_divergence_is_that_of_the_distributions():
    """Of (1/2, 1/2) from (1/4, 3/4), ln(4/3) / 2 nats, whatever is added to all logits; of a distribution from itself,
    none."""
    from parity_tests.harness.ladder import kl_divergence

    expected, got = np.log([[1, 1], [1, 3]]) + 7, np.log([[1, 3], [2, 6]])
    np.testing.assert_allclose(kl_divergence(expected, got), [np.log(4 / 3) / 2, 0], rtol=1e-13, atol=1e-15)


def test_the_divergence_of_one_token_is_seen_where_logits_are_within_their_bound():
    from parity_tests.harness.cases import Case
    from parity_tests.harness.ladder import compare_outputs
    from parity_tests.harness.measure import Outcome
    from torch_ref.spec.config import ComputeConfig

    logits = np.array([[[20, 0], [20, 20], [20, 0]]], np.float32)
    right = Outcome(0, 1, 0, np.ones((1, 1, 3, 2), np.float32), logits, np.zeros(0, int), {})
    other = logits.copy()
    other[0, 1, 1] += 1.8e-4  # 9e-6 of the largest; the divergence is an eighth of its square, 4e-9
    case = Case("made up", MODEL, ComputeConfig(), ComputeConfig())
    found = {each.rung: each.passed for each in compare_outputs(case, replace(right, logits=other), right)}
    assert found == {"hidden": True, "logits": True, "KL": False, "loss": True}
