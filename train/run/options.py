"""Every setting of a training run: one frozen dataclass.

`Options` is flat; the classes it is put together from only group the settings for `--help`, docs/settings.md and the
`settings.toml` that each run folder keeps. Model sizes are its field `model`: the table `[model]` in TOML, flat flags
such as `--num-layers` on the command line (`train/command_line.py`).

A setting made with `trajectory(...)` shapes the sequence of weights, beyond rounding: a resumed run must not change it
unawares. All others may differ from one start of a run to the next.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tomli_w

from torch_ref.spec.config import MESH_AXES, PRESETS, ComputeConfig, ModelConfig
from torch_ref.spec.decoding import LEAST_TEMPERATURE
from torch_ref.spec.interface import OptimizerConfig, Sampling, UserError
from torch_ref.spec.storage import user_path
from train.data.options import CorpusOptions, DataOptions
from train.run.schedule import Schedule
from train.settings import Repeated, trajectory


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to run, and where its files go."""

    preset: str = "smol-774m"
    """Named settings to start from: tiny, small, smol-774m or smol-774m-warm."""
    config: Path | None = None
    """TOML file of settings that override the preset's; a run's settings.toml is one."""
    run_dir: Path | None = None
    """Folder of the run. Default: runs/<preset>-<framework>. A run found there goes on from its latest checkpoint."""
    resume_from: Path | None = None
    """Begin from this checkpoint, in a run folder that has none of its own yet."""
    init_from: Path | None = None
    """Start from these weights (a file, an exported or a converted folder), whose sizes and tokenizer come along."""
    allow_changed_settings: bool = False
    """Resume although settings or data that shape the trajectory differ from the checkpoint's."""
    find_lr: bool = False
    """Before the first step, sweep learning rates, draw lr_finder.png, and train at the rate found."""
    seed: int = trajectory(0)
    """Seed of initial weights, data order and samples."""
    processes: int | None = None
    """How many processes train together (docs/cluster.md). Default: as the launcher says, which is one without any."""
    process_id: int | None = None
    """Number of this process among them, from 0, which alone writes the run folder. Default: as the launcher says."""
    coordinator: str | None = None
    """Address of process 0, HOST:PORT, at which processes find each other. Default: as the launcher says."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How it is computed: speed and memory, the same numbers but for rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute. auto: CUDA, then MPS (torch only), then the CPU."""
    mesh: str = "auto"
    """How devices share the work, as in data=2,fsdp=4,expert=1 (Flax alone: expert). auto: all split the weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = trajectory("auto")
    """Compute precision; weights, moments, sums stay float32 or wider. auto: bfloat16 on newer GPUs, else float32."""
    attention: str = "auto"
    """Attention path: auto, plain, or flax: blocked, cudnn; torch: sdpa, masked."""
    moe: str = "auto"
    """Expert path: auto, grouped, blocks, dense (all experts on all tokens), or flax: pallas (NVIDIA GPUs)."""
    remat: Literal["auto", "off", "experts", "layers"] = "auto"
    """What the backward pass computes again to save memory. auto: nothing if it all fits, else what is needed."""
    scan_layers: bool = True
    """Whether Flax compiles one layer and scans over the stack, instead of unrolling."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch compiles its layers and loss for training; on CUDA a pass then is one graph. auto: on for CUDA."""
    loss_chunk: int | Literal["auto"] = "auto"
    """Tokens whose logits exist at once. auto: 512 on a CPU, 4096 on a GPU."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Steps, batch, optimizer and schedule."""

    steps: int = trajectory(10_000)
    """Optimizer steps of the main phase, over which the learning rate rises and falls."""
    tokens: int | str | None = None
    """Length of the main phase in tokens, in place of --steps: 200M, 1.5B or a plain number; rounded up to a step."""
    extended_steps: int = 100
    """Further steps at the final learning rate."""
    batch_size: int = trajectory(8)
    """Rows per optimizer step."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Rows a device takes per forward pass; gradients accumulate. auto: 1 on a CPU, what the memory takes elsewhere."""
    learning_rate: float = trajectory(0.003)
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = trajectory(500)
    """Steps of linear warm-up, at most the main phase; the first one uses learning-rate / warmup-steps."""
    lr_schedule: Literal["linear", "wsd"] = trajectory("linear")
    """Course of the learning rate. wsd (warm-up, stable, decay) allows a run to be extended: docs/long_runs.md."""
    decay_steps: int | Literal["auto"] = trajectory("auto")
    """Steps at the end of the main phase in which wsd lets the rate fall. auto: a fifth of the main phase."""
    final_lr_ratio: float = trajectory(0.1)
    """Learning rate at the end of the main phase and after it, as a part of the peak."""
    weight_decay: float = trajectory(0.01)
    """Weight decay of AdamW, on matrices only."""
    grad_clip: float = trajectory(1.0)
    """Largest global norm of the gradient; a larger one is scaled down to it."""
    beta1: float = trajectory(0.9)
    """Decay rate of AdamW's first moment."""
    beta2: float = trajectory(0.95)
    """Decay rate of AdamW's second moment."""
    eps: float = trajectory(1e-8)
    """Epsilon of AdamW, added outside the root."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after so many minutes of this start, to go on another time; 0: no limit."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; such a step updates nothing."""
    spike_factor: float = 1.5
    """A loss above this many times the running median is a spike; 0 turns the watch off."""
    spike_steps: int = 10
    """So many spikes in a row are a run that diverges, of which the log warns."""
    spike_action: Literal["warn", "rollback"] = "warn"
    """What is done about it. rollback: back to the weights of the last good checkpoint, with the next data."""


@dataclass(frozen=True, kw_only=True)
class CadenceOptions:
    """Checkpoints, validation and samples."""

    checkpoint_interval: int = 1000
    """Steps between checkpoints; one more at the end of each phase."""
    checkpoint_minutes: float = 0.0
    """Also save when the last checkpoint is so many minutes old; 0 goes by steps alone."""
    keep_checkpoints: int = 0
    """Keep only the latest N checkpoints; 0 keeps all. The best one by validation is kept apart."""
    eval_interval: int = 500
    """Steps between validations; 0 turns them off."""
    patience: int = 0
    """Stop early after this many validations in a row without a better loss; 0 never does."""
    min_delta: float = 0.0
    """How much better than the best, in nats per token, a validation loss must be to count as better."""
    sample_interval: int = 500
    """Steps between samples; 0 turns them off."""
    prompt: str = "Once upon a time"
    """The text that samples continue."""
    sample_tokens: int = 200
    """Number of tokens in a sample."""
    temperature: float = 0.8
    """Temperature of samples: below 1 likely tokens get likelier, above 1 less so."""
    top_k: int = 50
    """Samples draw from this many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Samples draw from the likeliest tokens that hold this much probability."""


@dataclass(frozen=True, kw_only=True)
class InstrumentOptions:
    """Where metrics go besides the console, training.logs, metrics.jsonl and plots."""

    profile_steps: str = ""
    """Trace these steps, as in 20-23, with the framework's profiler, into the folder profile (docs/long_runs.md)."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Report to Weights & Biases (pip install wandb)."""
    wandb_project: str = "smol-deepseek"
    """Name of the project at Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, DeviceOptions, CorpusOptions, TrainingOptions, CadenceOptions, InstrumentOptions):
    """Every setting of a run. Raises `UserError` naming the flag of an impossible value."""

    model: ModelConfig = trajectory(PRESETS["smol-774m"])
    """Sizes of the model."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Path):
                object.__setattr__(self, name, user_path(value))
            elif name in REPEATED:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.tokens is not None:
            # Only another way to give `steps`: kept, it would hide a later --steps.
            object.__setattr__(self, "steps", -(-self._token_count() // max(self.batch_size * self.seq_len, 1)))
            object.__setattr__(self, "tokens", None)
        at_least_one = (
            "steps batch_size rows_per_pass seq_len tokens_per_chunk shuffle_window checkpoint_interval sample_tokens "
            "max_skipped_steps spike_steps"
        )
        not_negative = (
            "extended_steps warmup_steps keep_checkpoints eval_interval sample_interval patience validation_rows "
            "min_delta weight_decay top_k seed data_retries"
        )
        for name in at_least_one.split():
            self._require(getattr(self, name) >= 1, SETTING.get(name, name), "must be at least 1")
        for name in not_negative.split():
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in "learning_rate grad_clip eps".split():
            self._require(0 < getattr(self, name) < math.inf, name, "must be a number above 0")
        least = LEAST_TEMPERATURE
        self._require(least <= self.temperature < math.inf, "temperature", f"must be a number from {least:g} on")
        if self.decay_steps != "auto":
            self._require(self.lr_schedule == "wsd", "decay_steps", "only --lr-schedule wsd holds the rate before it")
            self._require(1 <= self.decay_steps <= self.steps, "decay_steps", f"must be from 1 to --steps {self.steps}")
        self._require(
            self.spike_factor == 0 or 1 < self.spike_factor < math.inf, "spike_factor", "must be above 1, or 0"
        )
        self.profiled()
        for name in ("max_minutes", "checkpoint_minutes"):
            self._require(0 <= getattr(self, name) < math.inf, name, "must be a number of minutes, or 0")
        for name in ("beta1", "beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        for name in ("final_lr_ratio", "top_p"):
            self._require(0 < getattr(self, name) <= 1, name, "must be above 0 and at most 1")
        self._require(0 <= self.validation_fraction <= 1, "validation_fraction", "must be from 0 to 1")
        self.datasets()
        self.validation_files()
        self._require(
            self.batch_size % self.rows_per_pass == 0,
            "batch_size",
            f"must be a multiple of --micro-batch-size {self.micro_batch_size}",
        )
        self._require(self.document_bytes == 0 or self.document_bytes >= 256, "document_bytes", "must be 0 or from 256")
        self._require(bool(self.prompt), "prompt", "must not be empty")
        if self.find_lr and self.resume_from:
            raise UserError(
                "--find-lr: a run that goes on by --resume-from keeps the learning rate it has; leave out one of them"
            )
        self._require(
            self.seq_len <= self.model.max_position,
            "seq_len",
            f"must be at most --max-position {self.model.max_position}",
        )
        self._require(
            not self.sample_interval or self.model.max_position >= 2,
            "sample_interval",
            f"--max-position {self.model.max_position} has no room for a prompt and a token; give 0",
        )
        self._require(
            not self.patience or (self.eval_interval and self.validates),
            "patience",
            "needs validation: --eval-interval, --validation-rows and --validation-fraction above 0",
        )

        self._require_processes()
        self._require(
            self.batch_size % (self.rows_per_pass * self.devices) == 0,
            "batch_size",
            f"must be a multiple of {self.rows_per_pass * self.devices}: {self.rows_per_pass} (--micro-batch-size "
            f"{self.micro_batch_size}) on each of the {self.devices} devices of --mesh {self.mesh}",
        )
        experts = self.model.n_routed_experts
        self._require(
            experts % self.mesh_shape[2] == 0, "mesh", f"expert must be a divisor of --n-routed-experts {experts}"
        )

    def _require_processes(self) -> None:
        given = self.processes, self.process_id, self.coordinator
        if given == (None, None, None) or given == (1, None, None):
            return
        together = "--processes N, --process-id K and --coordinator HOST:PORT are given together"
        self._require(None not in given, next(name for name in PROCESS if getattr(self, name) is not None), together)
        self._require(self.processes >= 1, "processes", "must be at least 1")
        last = self.processes - 1
        self._require(0 <= self.process_id <= last, "process_id", f"must be from 0 to {last}, below --processes")
        valid = re.fullmatch(r".+:\d{1,5}", self.coordinator)
        self._require(valid is not None, "coordinator", "must be HOST:PORT, of the machine of process 0")

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return self.validation_rows > 0 and (self.validation_fraction > 0 or bool(self.validation_dataset))

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise UserError(f"{flag(name)} {getattr(self, name)}: {rule}")

    def _token_count(self) -> int:
        number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", str(self.tokens).replace("_", ""), re.IGNORECASE)
        self._require(number is not None, "tokens", "must be a number such as 200M, 1.5B or 50000000")
        count = float(number[1]) * 1000 ** " KMBT".index(number[2].upper() or " ")
        self._require(count < math.inf, "tokens", "must be below 1e308")
        self._require(round(count) >= 1, "tokens", "must be at least 1")
        return round(count)

    def profiled(self) -> range:
        """Numbers (from 1) of the steps to trace; empty if none are."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile_steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        valid = not self.profile_steps or (found and 1 <= first <= last <= self.total_steps)
        self._require(valid, "profile_steps", f"must be FIRST-LAST, such as 20-23, from 1 to {self.total_steps}")
        return range(first, last + 1)

    @property
    def total_steps(self) -> int:
        return self.steps + self.extended_steps

    @property
    def rows_per_pass(self) -> int:
        """Rows of one micro-batch: a batch may be smaller than `micro_batch_size`."""
        return 1 if self.micro_batch_size == "auto" else min(self.micro_batch_size, self.batch_size)

    @property
    def tokens_per_chunk(self) -> int:
        """Of the loss: 512 tokens keep a CPU's logits in reach, a GPU has room and wants larger products."""
        return 512 if self.loss_chunk == "auto" else self.loss_chunk

    @property
    def micro_batches(self) -> int:
        return self.batch_size // (self.rows_per_pass * self.devices)

    @property
    def mesh_shape(self) -> tuple[int, int, int]:
        """Sizes of data, fsdp and expert; all 1 before `auto` is settled."""
        sizes = {}
        for part in self.mesh.split(",") if self.mesh != "auto" else ():
            name, _, size = part.strip().partition("=")
            valid = name in MESH_AXES and size.isdecimal() and int(size) >= 1
            self._require(valid, "mesh", f"{part!r} is none of data=N, fsdp=N, expert=N with N from 1")
            self._require(name not in sizes, "mesh", f"{name} has two sizes")
            sizes[name] = int(size)
        return tuple(sizes.get(name, 1) for name in MESH_AXES)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh_shape)

    @property
    def compute(self) -> ComputeConfig:
        """Once `dtype` and `remat` are settled: `auto` is no compute setting."""
        return ComputeConfig(
            self.dtype,
            self.attention,
            self.moe,
            self.remat,
            self.scan_layers,
            self.tokens_per_chunk,
            self.mesh_shape,
            self.compile,
        )

    @property
    def schedule(self) -> Schedule:
        decay = -(-self.steps // 5) if self.decay_steps == "auto" else self.decay_steps
        decay = decay if self.lr_schedule == "wsd" else None
        return Schedule(self.learning_rate, self.warmup_steps, self.steps, self.final_lr_ratio, decay)

    @property
    def stable_steps(self) -> int | None:
        """Steps until the decay begins, from where the run can be extended; None of a schedule without such a phase."""
        return self.schedule.decay_begins if self.lr_schedule == "wsd" else None

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            schedule=self.schedule,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
            micro_batch_size=self.rows_per_pass,
        )

    @property
    def data(self) -> DataOptions:
        return DataOptions(
            **vars(_part(self, CorpusOptions)),
            vocab_size=self.model.vocab_size,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def sampling(self, stop_token: int | None) -> Sampling:
        return Sampling(
            max_new_tokens=self.sample_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_token=stop_token,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values by name, `model` a nested dictionary."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def to_toml(self) -> str:
        """The settings as a file that `--config` reads: grouped, without those that belong to one start of a run (its
        folder, what it went on from, its time)."""
        blocks = [f"# {RunOptions.__doc__}\n" + _toml_lines({"preset": self.preset, "seed": self.seed})]
        for section in SECTIONS[1:]:
            values = {name: value for name, value in vars(_part(self, section)).items() if name not in OF_ONE_START}
            blocks.append(f"# {section.__doc__}\n" + _toml_lines(values))
        return "\n".join([*blocks, "[model]\n" + _toml_lines(self.model.to_dict())])


SETTING = {"rows_per_pass": "micro_batch_size", "tokens_per_chunk": "loss_chunk"}
"""The settings behind what is checked."""
OF_ONE_START = ("max_minutes",)
"""Settings that neither a run's settings.toml nor its checkpoints hand on, besides those of `RunOptions`."""
PROCESS = ("processes", "process_id", "coordinator")
"""Settings by which several processes find each other."""

SECTIONS = Options.__bases__
REPEATED = tuple(name for name, hint in get_type_hints(Options, include_extras=True).items() if hint == Repeated)
GROUPS = (*SECTIONS, ModelConfig)
"""The groups of `--help` and of the settings table, in order."""


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def trajectory_differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence part per setting that shapes the trajectory and differs between two `Options.to_dict()`."""
    differences = []
    for field in dataclasses.fields(Options):
        if not field.metadata.get("trajectory"):
            continue
        # A setting that came later than the checkpoint: the default is what there was before.
        before, after = stored.get(field.name, field.default), now.get(field.name, field.default)
        pairs = {field.name: (before, after)}
        if isinstance(before, dict) and isinstance(after, dict):
            pairs = {name: (before.get(name), after.get(name)) for name in sorted(before | after)}
        differences += [f"{flag(name)} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
    return differences


def _part(options: Options, group: type) -> Any:
    """One group's own instance out of the flat options."""
    return group(**{field.name: getattr(options, field.name) for field in dataclasses.fields(group)})


def _toml_lines(values: dict[str, Any]) -> str:
    """`name = value` lines. TOML has no null."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return tomli_w.dumps({name: value for name, value in values.items() if value is not None})
