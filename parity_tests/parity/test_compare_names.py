"""Which tensor of one side is which of the other: proposed from names and shapes where they leave no doubt."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="one side is torch")
pytest.importorskip("flax", reason="the other side is Flax")

from parity_tests.harness.links import Slot, propose
from torch_ref.spec.interface import UserError


def slots(**shapes: tuple[int, ...]) -> dict[str, Slot]:
    return {
        name.replace("_weight", ".weight"): Slot(name, shape, "linear" if len(shape) == 2 else "")
        for name, shape in shapes.items()
    }


def test_names_are_proposed_where_they_leave_no_doubt():
    links = propose(
        slots(q_proj_weight=(4, 4), k_proj_weight=(4, 4), up_weight=(8, 4), down_weight=(4, 8)),
        {"wq": (4, 4), "wk": (4, 4), "up_w": (4, 8), "down_w": (8, 4)},
        {},
    )
    assert {link.torch: link.jax for link in links} == {
        "q_proj.weight": "wq",
        "k_proj.weight": "wk",
        "up.weight": "up_w",
        "down.weight": "down_w",
    }
    with pytest.raises(UserError, match="a.weight could be x.w or y.w; b.weight could be x.w or y.w: say which"):
        propose(slots(a_weight=(4, 4), b_weight=(4, 4)), {"x.w": (4, 4), "y.w": (4, 4)}, {})


def test_layers_are_told_apart_by_their_numbers():
    names = [f"layers.{index}.{name}" for index in (1, 11, 2) for name in ("q", "k")]
    leaves = {f"blocks.{index}.attn.{name}.kernel": (4, 4) for index in (11, 2, 1) for name in ("k", "q")}
    links = propose({f"{name}.weight": Slot(name, (4, 4), "linear") for name in names}, leaves, {})
    assert {link.torch: link.jax for link in links} == {
        f"layers.{index}.{name}.weight": f"blocks.{index}.attn.{name}.kernel" for index in (1, 11, 2) for name in "qk"
    }


def test_a_square_matrix_is_laid_out_like_the_others():
    sides = slots(up_weight=(8, 4), square_weight=(4, 4))
    for shape, how in (((4, 8), "transposed"), ((8, 4), "as it is")):
        links = {link.torch: link for link in propose(sides, {"up.w": shape, "square.w": (4, 4)}, {})}
        assert links["square.weight"].how == how and "like the other tensors named w" in links["square.weight"].doubt
