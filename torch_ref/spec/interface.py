"""What the training loop and a framework say to each other: the `Backend` protocol and the values that cross it.

Only NumPy arrays, numbers, strings and paths cross, so the loop knows neither torch nor jax. Two classes implement
the protocol: `torch_ref.backend.TorchBackend` and `flax_model.backend.FlaxBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.processes import Processes

IGNORE = -1
"""A target that is not scored: padding of a short validation row."""


class UserError(Exception):
    """Something the user can mend. The message is one line that names the option or file and the mend; the entry
    points print it without a traceback and exit with code 2."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm, and the schedule. The update of one parameter p with gradient g is

    g <- g * min(1, clip / norm)         norm over all gradients; exact, no epsilon
    m <- b1 m + (1 - b1) g               v <- b2 v + (1 - b2) g^2
    p <- p - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)
    """

    schedule: Callable[[int], float]
    """Learning rate of the update after `step` earlier ones (0 for the first)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    micro_batch_size: int = 1
    """Rows per forward pass; a batch is accumulated from batch / micro_batch_size of them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. Losses are nats per token, means over the step's scored targets."""

    loss: float
    balance_loss: float
    """Sequence balance loss before its coefficient, mean over the step's sequences."""
    grad_norm: float
    """Global norm of the mean gradient before clipping."""
    learning_rate: float
    """The rate this update used."""
    tokens: int
    """Targets scored."""
    applied: bool
    """False if loss or gradient was not finite: parameters, moments and balance bias are then untouched."""
    expert_counts: np.ndarray = field(repr=False)
    """int64 [moe_layers, experts]: tokens each expert took in this step."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in this order, as in `transformers`.

    Defaults are those of the samples that training prints. `greedy` takes the most likely token (after the
    repetition penalty) and ignores the rest.
    """

    max_new_tokens: int = 200
    greedy: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 50
    """0 turns it off."""
    top_p: float = 0.95
    min_p: float = 0.0
    stop_token: int | None = 0
    """End of text; None never stops early."""


class Backend(Protocol):
    """One framework's model, optimizer and checkpoint format. `inputs` and `targets` are int32 [batch, seq], where
    targets[:, t] is the token after inputs[:, t], or `IGNORE`."""

    framework: str
    """`flax` or `torch`."""
    model_config: ModelConfig
    compute: ComputeConfig
    processes: Processes
    """Those that train together. All call the same methods in the same order, with the same arguments."""
    checkpoint_suffix: str
    """Appended to a checkpoint's name: `.pt` for torch, nothing for Flax (orbax writes folders)."""

    @property
    def device(self) -> str:
        """The device in words, for the log."""

    @property
    def peak_memory(self) -> int | None:
        """Bytes held at most so far: of the device's memory, on a CPU the process's; None where that is not known."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps since initialisation, skipped ones included."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the device works on a begun step while the host goes on, so that the next one is best begun before
        the result is asked for."""

    def agree(self, wishes: Sequence[int]) -> Callable[[], list[int]]:
        """The largest of each number (32 bits) over all processes. Begins at once; what is returned waits for the
        answer, which on a device comes after all that was begun before."""

    def init(self, seed: int) -> None:
        """Seeded weights, zero moments, step 0."""

    def begin_step(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        """One optimizer step on one batch, accumulated over micro-batches. It counts as done; what is returned waits
        for the device and tells the result, also when later steps have begun."""

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> StepResult:
        """`begin_step`, and its result."""

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Sum of the next-token losses in nats, and how many targets were scored. Changes no state."""

    def generate(
        self, prompt: list[int], sampling: Sampling, seed: int, on_token: Callable[[list], None] | None = None
    ) -> list[int]:
        """The new tokens only. Draws from a random stream of its own, a function of `seed`. `on_token` is called after
        each token, and may raise to end it. Of several processes only the one that writes gets any."""

    def save(self, folder: Path, name: str, meta: dict) -> Path:
        """Write checkpoint `folder/name<suffix>`: weights, moments, balance bias, step counters and `meta` (JSON).
        May go on writing in the background; `find` sees it only when whole. Returns its path."""

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        """While it is entered, the framework's profiler runs; afterwards a trace for Perfetto lies in `folder`."""

    def check_saves(self) -> None:
        """Raises what went wrong in the background so far; does not wait for it to end."""

    def wait(self) -> None:
        """Block until every save has landed; raises what went wrong in the background."""

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        """Checkpoints in a folder with their steps, oldest first: whole ones, and what is left of damaged ones."""

    def restore(self, path: Path) -> dict:
        """Load a checkpoint whole and return its `meta`. Raises `UserError` naming what differs when the stored
        tree, shapes, dtypes or model config are not this backend's; `DamagedCheckpoint` when it is not what was
        written."""

    def delete(self, path: Path) -> None:
        """Remove a checkpoint."""

    def snapshot(self) -> Any:
        """A copy of the whole training state in host memory, for `rollback`."""

    def rollback(self, snapshot: Any) -> None:
        """Return to a snapshot."""

    def keep_within_documents(self, separator: int) -> None:
        """Let attention keep to documents, in training and in `evaluate`: a token `separator` begins one. Before the
        first step."""

    def set_schedule(self, schedule: Callable[[int], float]) -> None:
        """Use another learning-rate schedule from the next step on (the LR finder's sweep)."""

    def state(self) -> TrainingState:
        """The training state in neutral form (for conversion)."""

    def load_state(self, state: TrainingState) -> None:
        """Take over a neutral training state; where it has no moments, they start at zero and the step at 0."""

    def close(self) -> None:
        """Wait for saves and let go of files and threads."""


@dataclass
class TrainingState:
    """A training state that belongs to no framework: float arrays by the names of the parameter table."""

    model_config: ModelConfig
    weights: Any
    """Mapping name -> array of every row of the table, balance biases included."""
    first_moment: Any = None
    """Mapping name -> array of the trainable rows, or None."""
    second_moment: Any = None
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    updates: int = 0
    """Updates applied: the t of Adam's bias correction."""
    meta: dict = field(default_factory=dict)
    """What the loop stored: options, data cursor, early-stopping state."""
