"""The ladder can fail: every planted fault is caught, and named where it was planted."""

import pytest

pytest.importorskip("torch", reason="plants faults in torch")
pytest.importorskip("flax", reason="compares with Flax")

from parity_tests.harness import faults_attention, faults_experts, faults_training, mutations  # noqa: F401 (they register their faults)


@pytest.mark.parametrize("rung", ["trace", "optimizer step"])
def test_nothing_is_caught_where_nothing_is_planted(rung):
    assert mutations.first_failure(mutations.measure(rung)) is None


@pytest.mark.parametrize("planted", mutations.MUTATIONS, ids=lambda planted: planted.name)
def test_fault_is_caught_where_it_was_planted(planted):
    caught = mutations.caught(planted)
    assert planted.shows_at(caught), f"expected {planted.rung} at {planted.where}, got {caught}"


def test_there_are_many_different_faults():
    assert len({planted.name for planted in mutations.MUTATIONS}) == len(mutations.MUTATIONS) >= 60
