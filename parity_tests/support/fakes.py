"""A backend and data of NumPy alone, small and exact, so that tests of the loop take milliseconds.

The "model" is a vector that learns the mean token of the batches; its loss depends on every batch it has seen, so a
run that loses, repeats or reorders data shows it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from torch_ref.spec.checkpoint import DamagedCheckpoint
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, OptimizerConfig, Sampling, StepResult, TrainingState, UserError
from torch_ref.spec.processes import ALONE, agree_alone
from train.data.corpus import DataError
from train.data.feed import Validation
from train.data.options import HELD_OUT
from train.data.packing import Rows
from train.run.options import Options

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    intermediate_size=8,
    moe_intermediate_size=8,
    n_routed_experts=4,
    max_position=64,
)


def small_options(**changes: object) -> Options:
    """A run of 12 + 3 steps with everything switched on."""
    values: dict = {
        "preset": "tiny",
        "model": MODEL,
        "dtype": "float32",
        "remat": "off",
        "steps": 12,
        "extended_steps": 3,
        "warmup_steps": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "seq_len": 8,
        "learning_rate": 0.1,
        "checkpoint_interval": 5,
        "eval_interval": 4,
        "sample_interval": 5,
        "sample_tokens": 3,
        "tensorboard": False,
    }
    return Options(**(values | changes))


class FakeBackend:
    framework = "fake"
    checkpoint_suffix = ".npz"
    device = "imagination"
    peak_memory = 1_500_000_000
    runs_ahead = False
    processes = ALONE
    agree = staticmethod(agree_alone)
    separator: int | None = None

    def __init__(self, options: Options) -> None:
        self.model_config: ModelConfig = options.model
        self.compute: ComputeConfig = options.compute
        self.optimizer: OptimizerConfig = options.optimizer
        self.schedule = options.schedule
        self.broken_steps: set[int] = set()
        """Numbers (from 1) of steps whose loss is not a number."""
        self.before_step: Callable[[int], None] = lambda number: None
        self.validation_losses: Callable[[int], float | None] = lambda step: None
        """A loss per token to report instead of the model's own."""
        self.sample_seeds: list[int] = []
        self.saves: list[Path] = []

    @property
    def steps_done(self) -> int:
        return self._steps

    def keep_within_documents(self, separator: int) -> None:
        self.separator = separator

    def init(self, seed: int) -> None:
        self._weights = np.random.default_rng(seed).standard_normal(4)
        self._steps = 0

    def begin_step(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        self.before_step(self._steps + 1)
        rate = float(self.schedule(self._steps))
        self._steps += 1
        error = self._weights - targets.mean()
        broken = self._steps in self.broken_steps
        if not broken:
            self._weights = self._weights - rate * error
        result = StepResult(
            loss=math.nan if broken else float((error**2).mean()),
            balance_loss=1.0,
            grad_norm=float(np.abs(error).max()),
            learning_rate=rate,
            tokens=int((targets != IGNORE).sum()),
            applied=not broken,
            expert_counts=np.array([[6, 2, 4, 4], [4, 4, 4, 4]]),
        )
        return lambda: result

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> StepResult:
        return self.begin_step(inputs, targets)()

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        assert len(inputs) == self.optimizer.micro_batch_size, "one shape, whatever is left over"
        scored = targets != IGNORE
        told = self.validation_losses(self._steps)
        if told is not None:
            return told * int(scored.sum()), int(scored.sum())
        # Tokens lose differently much, so that a mean of means shows.
        loss = float(np.abs(self._weights).mean())
        return float((loss * scored * (1 + targets % 7)).sum()), int(scored.sum())

    def generate(self, prompt: list[int], sampling: Sampling, seed: int, on_token=None) -> list[int]:
        assert sampling.stop_token == FakeTokenizer.eot_id, "a sample ends where its text does"
        self.sample_seeds.append(seed)
        for _ in range(sampling.max_new_tokens):
            if on_token:
                on_token([65])
        return [65 + seed % 26] * sampling.max_new_tokens

    def save(self, folder: Path, name: str, meta: dict) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}{self.checkpoint_suffix}"
        np.savez(path, weights=self._weights, steps=self._steps, meta=json.dumps(meta))
        self.saves.append(path)
        return path

    @contextmanager
    def trace(self, folder: Path) -> Iterator[None]:
        before = self._steps
        yield
        (folder / "trace.json.gz").write_text(f"{before + 1} to {self._steps}")

    def check_saves(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        return sorted((int(path.stem.split("_")[-1]), path) for path in folder.glob("step_*.npz"))

    def restore(self, path: Path) -> dict:
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint")
        try:
            with np.load(path) as stored:
                self._weights, self._steps = stored["weights"], int(stored["steps"])
                return json.loads(str(stored["meta"]))
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DamagedCheckpoint(path, error) from error

    def delete(self, path: Path) -> None:
        path.unlink()

    def snapshot(self) -> tuple[np.ndarray, int]:
        return self._weights.copy(), self._steps

    def rollback(self, snapshot: tuple[np.ndarray, int]) -> None:
        self._weights, self._steps = snapshot

    def set_schedule(self, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule

    def state(self) -> TrainingState:
        return TrainingState(self.model_config, {"weights": self._weights}, step=self._steps)

    def load_state(self, state: TrainingState) -> None:
        self._weights, self._steps = state.weights["weights"], state.step

    def close(self) -> None:
        pass


class FakeTokenizer:
    eot_id, vocab_size = 0, 300

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        return self.decode(ids)


class FakeData:
    """Batch n is drawn from (seed, n); the cursor is the number of the next one."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = FakeTokenizer()
        self.identity = {"dataset": "dice", "files": {"a": "1"}, "versions": {"numpy": "1"}}
        self.validation = self._rows(5, seed=99)
        self.validation.targets[-1, 3:] = IGNORE
        self.validation_bytes = 100
        self.bad_rows = 0
        self.notes: list[str] = []
        self.validations = {HELD_OUT: Validation(self.validation, self.validation_bytes)}
        self.judged_by = "five rows"
        self.fails_at: int | None = None
        """Number (from 0) of the batch that cannot be read."""
        self.given: list[int] = []
        self.closed = 0
        self.scored_is_kept = False

    def _rows(self, count: int, seed: int) -> Rows:
        tokens = np.random.default_rng(seed).integers(1, 9, (count, self.options.seq_len + 1), dtype=np.int32)
        return Rows(tokens[:, :-1].copy(), tokens[:, 1:].copy())

    def keep_scored(self) -> None:
        self.scored_is_kept = True

    def batches(self, cursor: dict | None = None) -> Iterator[FakeBatch]:
        number = cursor["batch"] if cursor else 0
        try:
            while True:
                if number == self.fails_at:
                    raise DataError(f"dice: batch {number} fell under the table")
                rows = self._rows(self.options.batch_size, seed=number)
                self.given.append(number)
                number += 1
                yield FakeBatch(*rows, cursor={"batch": number})
        finally:
            self.closed += 1


@dataclasses.dataclass(frozen=True)
class FakeBatch:
    inputs: np.ndarray
    targets: np.ndarray
    cursor: dict
