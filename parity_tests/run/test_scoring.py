"""Validation: the arithmetic, when it is due, which state is the best, and early stopping."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest

from parity_tests.support.fakes import small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import IGNORE, TrainingState
from train.data.feed import Validation
from train.run.progress import Progress
from train.run.runlog import read_metrics, validation_curves
from train.run.scoring import fixed_size_parts
from train.shell import COMPLETE
from train.state.card import model_card


def test_a_state_is_the_best_by_the_same_rows(stage: Stage) -> None:
    """Losses of other rows are not compared with it."""
    stage.backend.validation_losses = lambda step: 1.0
    assert stage.train() == COMPLETE and stage.files("best") == ["step_4.npz"]
    stage.prepare(small_options(extended_steps=8))
    stage.backend.validation_losses = lambda step: 2.0
    stage.data.judged_by = "three rows"
    assert stage.train() == COMPLETE
    assert "Warning: changed since the checkpoint: the rows that decide which state is the best" in stage.text
    assert stage.files("best") == ["step_16.npz"] and stage.records("validation")[-1]["stale_validations"] == 1


def test_validation_weighs_tokens_and_counts_bytes(straight: Stage) -> None:
    targets = straight.data.validation.targets
    scored = targets != IGNORE
    last = straight.records("validation")[-1]
    weights = np.abs(np.load(straight.run_dir / "deepseek_final.npy")).mean()
    loss_sum = float((weights * scored * (1 + targets % 7)).sum())
    assert last["tokens"] == scored.sum() == 5 * 8 - 5
    assert last["loss"] == pytest.approx(loss_sum / scored.sum(), rel=1e-12)
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]), rel=1e-12)
    assert last["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / 100, rel=1e-12)


@pytest.mark.parametrize("held_out", [True, False])
def test_validation_datasets_have_records_of_their_own(stage: Stage, held_out: bool) -> None:
    """The held-out rows decide on the best state, or where there are none the first dataset."""
    stage.backend.validation_losses = lambda step: {4: 3.0, 8: 2.0, 12: 4.0, 15: 5.0}[step]
    own = Validation(stage.data._rows(3, seed=5), 50)
    others = {"news": own, "code": own._replace(bytes=10)}
    stage.data.validations = (stage.data.validations if held_out else {}) | others
    assert stage.train() == COMPLETE
    curves = validation_curves(read_metrics(stage.run_dir))
    assert list(curves) == [None, "news", "code"] if held_out else ["news", "code"]
    assert [record["loss"] for record in curves["code"]] == [3.0, 2.0, 4.0, 5.0]
    assert curves["code"][0]["bits_per_byte"] == pytest.approx(3.0 * 24 / math.log(2) / 10)
    judged = [name for name, records in curves.items() if "best_step" in records[0]]
    assert judged == [None if held_out else "news"] and stage.files("best") == ["step_8.npz"]
    assert "Validation at step 8, code | Loss: 2.0000 | Perplexity: 7.39 | Bits per byte: 6.9249\n" in stage.text
    judge, bits = ("", "1.0099") if held_out else (", news", "1.3850")
    best = f"Validation at step 8{judge} | Loss: 2.0000 | Perplexity: 7.39 | Bits per byte: {bits} (the best so far)"
    assert best in stage.text
    assert "Validation dataset news: 3 rows" in stage.text


@pytest.mark.parametrize(("interval", "at"), [(0, []), (6, [6, 12, 15]), (15, [15]), (16, [])])
def test_validation_cadence(stage: Stage, interval: int, at: list[int]) -> None:
    assert stage.train(eval_interval=interval) == COMPLETE
    assert [record["step"] for record in stage.records("validation")] == at


@pytest.mark.parametrize("at_step", [7, 10])
def test_early_stopping_ends_the_run_and_survives_a_resume(
    stage: Stage, at_step: int, capsys: pytest.CaptureFixture
) -> None:
    """Also one that comes before the last validation, which the checkpoint then owes."""
    losses = {2: 3.0, 4: 2.0, 6: 1.95, 8: math.nan, 10: 2.5}
    settings = {"eval_interval": 2, "patience": 3, "min_delta": 0.1}
    stage.prepare(small_options(**settings))
    stage.backend.validation_losses = losses.get
    stage.backend.before_step = kill_at(signal.SIGINT, at_step)
    assert stage.train() == 130
    stage.prepare(small_options(**settings))
    stage.backend.validation_losses = losses.get
    assert stage.train() == COMPLETE
    # 1.95 beats 2.0 by less than min_delta, NaN is never best: the third validation after step 4 ends the run.
    assert stage.losses()[-1][0] == 10
    assert stage.files("best") == ["step_4.npz"] and "step_final_10.npz" in stage.files("checkpoints")
    assert "stopped early at step 10, after 3 validations without a better one" in stage.text
    assert "best validation loss 2.0000 at step 4" in stage.text
    meta = stage.backend.restore(stage.run_dir / "checkpoints" / "step_final_10.npz")
    card = model_card(TrainingState(stage.options.model, {}, step=10, meta=meta), None)
    assert "lowest loss on held-out text, to within 0.1: 2.0000 nats per token" in card

    stage.prepare(small_options(**settings))
    assert stage.train() == COMPLETE
    assert stage.data.given == [] and "Nothing is left to do" in capsys.readouterr().out
    # With more patience it goes on.
    stage.prepare(small_options(**settings | {"patience": 99}))
    assert stage.train() == COMPLETE
    assert stage.losses()[-1][0] == 15


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_best(first: float) -> None:
    progress = Progress()
    assert not progress.validated(1, first, 0.0) and progress.stale_validations == 1
    assert progress.validated(2, 5.0, 0.0) and progress.best_step == 2
    assert progress.stale_validations == 0, "patience counts validations in a row"
    assert not progress.validated(3, first, 0.0) and progress.best_loss == 5.0
    progress.forget_best()
    assert progress == Progress(), "nor does a count of other rows' losses stop the run"


def test_parts_have_one_size_and_score_each_target_once() -> None:
    inputs = np.arange(10, dtype=np.int32).reshape(5, 2)
    parts = list(fixed_size_parts(inputs, inputs + 1, 2))
    assert [part.shape for part, _ in parts] == [(2, 2)] * 3
    assert np.array_equal(np.concatenate([part for part, _ in parts])[:5], inputs)
    assert np.array_equal(np.concatenate([targets for _, targets in parts])[5], [IGNORE, IGNORE])
