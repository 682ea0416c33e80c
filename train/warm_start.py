"""Turn SmolLM2-135M (or another Llama of a preset's shape) into this model, in minutes on a CPU:

    python -m train.warm_start --from SmolLM2-135M.gguf --out warm
    python -m torch_ref.train --preset smol-774m-warm --init-from warm        or train.flax_main

Four stages: each attention layer converted in closed form (`warm_attention.py`), then fitted to the old layer's output
(`warm_fit.py`); the dense model distilled as a whole; MLPs copied into experts (`warm_experts.py`). The folder that
comes out loads in `transformers`; it also holds a table of losses and errors, and their plot.

An interrupted conversion goes on where it was: layers that are done lie in the folder `<out>.partial`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Int32
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torch_ref.config import PRESETS, ComputeConfig, ModelConfig
from torch_ref.huggingface import export_folder
from torch_ref.interface import UserError
from torch_ref.parameters import Parameter
from torch_ref.storage import TensorReader, TensorSpec, TensorWriter, read_json, write_json
from train.command_line import first_sentence
from train.corpus import Reader, open_source
from train.packing import Data, DataOptions, Rows, open_data, rows_of
from train.tokenizer import TextTokenizer, load_tokenizer
from train.warm_attention import convert_attention
from train.warm_experts import balanced_router, upcycled_values
from train.warm_fit import (
    AdamWSettings,
    MlpInputs,
    attention_error,
    calibrate,
    dense_values,
    distill,
    fit_attention,
    mean_loss,
    mlp_inputs,
)
from train.warm_report import draw, print_tables
from train.warm_teacher import Teacher, check_shape, check_tokenizer, read_teacher

CALIBRATION_ROWS = 8
"""Fit rows that the closed form takes its statistics from."""
CHECK_ROWS = 4
"""Held-out rows that a layer's error is measured on."""
FORWARD_ROWS = 8
"""Rows that go through a teacher's layer together."""
Texts = dict[str, dict[int, Rows]]
"""Rows to measure on, by text and length: the same tokens at every length."""
REPORT = "warm_start.json"
PLOT = "warm_start.png"


@dataclass(frozen=True, kw_only=True)
class WarmStartOptions:
    """Turn a Llama such as SmolLM2-135M into latent attention and experts."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """The old model: a GGUF file, a transformers folder, or a Hub name such as HuggingFaceTB/SmolLM2-135M."""
    out: Path
    """New folder for the model."""
    preset: str = "smol-774m-warm"
    """Sizes of the new model."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; it must have the old model's entries. Default: the old model's own."""
    dataset: str = "python-docs"
    """Text to fit on and, the held-out part of it, to measure on: python-docs, files, or a Hub name."""
    also_measure: tuple[str, ...] = ()
    """Further texts to measure losses on; nothing is fitted to them."""
    text_field: str = "text"
    """Column or key of the datasets that holds the text."""
    seq_len: int = 512
    """Tokens of a row in the fits."""
    fit_rows: int = 64
    """Rows that the attention layers are fitted on."""
    fit_steps: int = 60
    """AdamW steps a layer; 0 keeps the closed form."""
    fit_batch: int = 4
    """Rows a step."""
    fit_learning_rate: float = 0.002
    """Peak."""
    distill_steps: int = 80
    """Steps of the whole dense model towards the old model's predictions; 0 leaves it as the layers were fitted."""
    distill_batch: int = 2
    """Rows a step; all rows are new."""
    distill_learning_rate: float = 0.0005
    """Peak."""
    diversity: float = 0.0
    """Share of each routed expert's units that are drawn anew; 0 keeps the dense model's function exactly."""
    measure_tokens: int = 16384
    """Of each text, at most."""
    measure_lengths: tuple[int, ...] = (512, 2048)
    """Row lengths at which losses are measured."""
    validation_fraction: float = 0.1
    """Of the dataset's documents, held out."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Of the distillation's forward and backward passes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tensors written."""
    seed: int = 0
    """Of row order, router and diversity."""


def warm_start(options: WarmStartOptions, config: ModelConfig, console: Console) -> dict:
    """Make `options.out` and return the report that is stored in it as `warm_start.json`.

    Raises:
        UserError: the old model or its tokenizer does not fit, text is missing, or an option is out of range.
    """
    _check(options, config)
    old_config, weights, own_tokenizer = read_teacher(options.source)
    check_shape(options.source, old_config, config)
    teacher = Teacher(old_config, weights)
    tokenizer = own_tokenizer
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        check_tokenizer(own_tokenizer, tokenizer)
    work = Work(options.out.with_name(options.out.name + ".partial"))
    tokenizer.save(work.folder / "tokenizer")
    data = open_data(_data_options(options, config, work), work.folder / "data", resume=work.begun)
    work.claim(_identity(options, config, teacher, data))

    stages = _Stages(options, config, teacher, tokenizer, data, work, console)
    report = stages.run()
    draw(report, options.out / PLOT)
    write_json(options.out / REPORT, report)
    work.remove()
    return report


def _check(options: WarmStartOptions, config: ModelConfig) -> None:
    for name in ("fit_rows", "fit_batch", "distill_batch", "measure_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    for name in ("fit_steps", "distill_steps"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 0")
    if not 0 <= options.diversity <= 1:
        raise UserError(f"--diversity {options.diversity}: is a share, from 0 to 1")
    for name, lengths in (("--seq-len", (options.seq_len,)), ("--measure-lengths", options.measure_lengths)):
        for length in lengths:
            if not 2 <= length <= config.max_position:
                raise UserError(f"{name} {length}: must be from 2 to the model's max_position = {config.max_position}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out}: exists already; name a new folder")


def _data_options(options: WarmStartOptions, config: ModelConfig, work: Work) -> DataOptions:
    return DataOptions(
        dataset=options.dataset,
        text_field=options.text_field,
        tokenizer=str(work.folder / "tokenizer"),
        vocab_size=config.vocab_size,
        seq_len=options.seq_len,
        batch_size=1,
        seed=options.seed,
        validation_rows=max(options.measure_tokens // options.seq_len, CHECK_ROWS),
        validation_fraction=options.validation_fraction,
    )


def _identity(options: WarmStartOptions, config: ModelConfig, teacher: Teacher, data: Data) -> dict:
    """What the layers in a partial folder depend on."""
    shaping = "seq_len fit_rows fit_steps fit_batch fit_learning_rate seed".split()
    return {
        "model": config.to_dict(),
        "weights": teacher.fingerprint(),
        "data": {key: value for key, value in data.identity.items() if key != "versions"},
        "options": {name: getattr(options, name) for name in shaping},
    }


class Work:
    """The folder `<out>.partial`: layers that are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "layers").mkdir(parents=True, exist_ok=True)

    @property
    def begun(self) -> bool:
        return (self.folder / "identity.json").exists()

    def claim(self, identity: dict) -> None:
        """Raises `UserError` if the folder belongs to another conversion."""
        file = self.folder / "identity.json"
        if not self.begun:
            write_json(file, identity)
        for name, value in read_json(file).items():
            if value != identity.get(name):
                raise UserError(f"{self.folder}: from a warm start of other {name}; delete that folder")

    def layer(self, layer: int) -> tuple[dict[str, dict[str, np.ndarray]], dict] | None:
        """Weights by stage and measurements of a layer, if it is done."""
        tensors, facts = self._files(layer)
        if not facts.exists():
            return None
        stages: dict[str, dict[str, np.ndarray]] = {}
        for name, value in TensorReader(tensors).items():
            stage, _, tensor = name.partition(".")
            stages.setdefault(stage, {})[tensor] = value
        return stages, read_json(facts)

    def save_layer(self, layer: int, stages: dict[str, dict[str, np.ndarray]], facts: dict) -> None:
        flat = {f"{stage}.{name}": value for stage, weights in stages.items() for name, value in weights.items()}
        tensors, file = self._files(layer)
        with TensorWriter(tensors, [TensorSpec(name, value.shape, "float32") for name, value in flat.items()]) as out:
            for name, value in flat.items():
                out.write(name, value)
        write_json(file, facts)

    def _files(self, layer: int) -> tuple[Path, Path]:
        stem = self.folder / "layers" / f"{layer:03d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def remove(self) -> None:
        import shutil

        shutil.rmtree(self.folder)


class _Stages:
    """The stages in their order, and the report they fill."""

    def __init__(self, options, config, teacher, tokenizer, data, work, console) -> None:
        self.options: WarmStartOptions = options
        self.config: ModelConfig = config
        self.dense = dataclasses.replace(
            config, first_k_dense=config.num_layers, intermediate_size=config.moe_intermediate_size
        )
        self.teacher: Teacher = teacher
        self.tokenizer: TextTokenizer = tokenizer
        self.data: Data = data
        self.work: Work = work
        self.console: Console = console
        self.compute = ComputeConfig(attention="sdpa", moe="grouped")
        self.report: dict = {"losses": {}, "layers": [], "seconds": {}}

    def run(self) -> dict:
        from torch_ref.model import Model

        options, report = self.options, self.report
        texts = self.texts()
        rows = self.training_rows()
        self.measure("original", texts, self.teacher.hidden, self.teacher.embedding)

        with self.timed("layers"):
            converted, fitted = self.layers(rows[: options.fit_rows])
        model = Model(self.dense)
        for stage, attention in (("converted", converted), ("fitted", fitted)):
            if stage == "fitted" or options.fit_steps:
                model.load_values(dense_values(self.dense, self.teacher, attention))
                self.measure(stage, texts, self.hidden_of(model), model.embed_tokens.weight)
        if options.distill_steps:
            with self.timed("distillation"):
                self.distill(model, rows[options.fit_rows :])
            made_by = f"{options.distill_steps} x {options.distill_batch} at {options.distill_learning_rate}"
            self.measure("distilled", texts, self.hidden_of(model), model.embed_tokens.weight, made_by)

        inputs = mlp_inputs(model, rows[:CALIBRATION_ROWS], self.compute)
        dense = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        with self.timed("experts"):
            export_folder(
                options.out,
                self.config,
                self.expert_values(dense, inputs),
                dtype=options.dtype,
                tokenizer=self.work.folder / "tokenizer",
                end_of_text=self.tokenizer.eot_id,
            )
        del model
        experts = Model(self.config).load_values(self.expert_values(dense, inputs))
        with self.timed("measuring experts"):
            self.report["losses"]["experts"] = losses_of(texts, self.hidden_of(experts), experts.embed_tokens.weight)
        report["expert_load"] = self.expert_load(experts, rows[:CALIBRATION_ROWS])
        report["options"] = {name: str(value) for name, value in vars(options).items()}
        print_tables(report, self.console)
        return report

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report["seconds"][name] = round(time.perf_counter() - start, 1)

    # Text

    def texts(self) -> Texts:
        held_out = self.data.validation
        scored = held_out.targets.ravel() >= 0
        if not scored.any():
            raise UserError(f"--dataset {self.options.dataset}: too few documents to hold any out; name a larger one")
        tokens = {self.options.dataset: [int(held_out.inputs[0, 0]), *held_out.targets.ravel()[scored].tolist()]}
        for name in self.options.also_measure:
            tokens[name] = self.tokens_of(name)
        return {
            name: {length: rows_of(text, length) for length in self.options.measure_lengths}
            for name, text in tokens.items()
        }

    def tokens_of(self, dataset: str) -> list[int]:
        """The first tokens of a text, documents whole but the last."""
        source = open_source(dataset, None, None, self.options.text_field, self.work.folder / "measured", False)
        tokens = [self.tokenizer.eot_id]
        for document in Reader(source):
            tokens += [*self.tokenizer.encode(document.text), self.tokenizer.eot_id]
            if len(tokens) > self.options.measure_tokens:
                break
        return tokens[: self.options.measure_tokens + 1]

    def training_rows(self) -> Int32[np.ndarray, "rows seq"]:
        """Rows for the layers' fit, and after them those of the distillation."""
        count = self.options.fit_rows + self.options.distill_steps * self.options.distill_batch
        batches = self.data.batches()
        rows = [next(batches).inputs[0] for _ in range(count)]
        batches.close()
        return np.stack(rows)

    # Stages

    def layers(self, rows: Int32[np.ndarray, "rows seq"]) -> tuple[list[dict], list[dict]]:
        """Every layer's attention, converted and fitted, on the old model's own activations."""
        import torch

        options, teacher = self.options, self.teacher
        check = self.data.validation.inputs[:CHECK_ROWS]
        hidden = teacher.embedding[torch.from_numpy(np.concatenate([check, rows])).long()]
        rotation = teacher.rotation(rows.shape[1])
        settings = AdamWSettings(options.fit_steps, options.fit_batch, options.fit_learning_rate)
        converted, fitted = [], []
        with _progress(self.console) as progress, torch.no_grad():
            bar = progress.add_task("attention layers", total=len(teacher.layers) * (options.fit_steps + 1))
            for index, layer in enumerate(teacher.layers):
                x = teacher.normed(hidden, layer.input_norm)
                wanted = torch.cat([teacher.attention(index, part, rotation) for part in x.split(FORWARD_ROWS)])
                done = self.work.layer(index)
                if done is None:
                    done = self.one_layer(index, x, wanted, settings, lambda: progress.advance(bar))
                    self.work.save_layer(index, *done)
                progress.update(bar, completed=(index + 1) * (options.fit_steps + 1))
                stages, facts = done
                converted.append(stages["converted"])
                fitted.append(stages.get("fitted", stages["converted"]))
                self.report["layers"].append(facts)
                hidden += wanted
                for part in hidden.split(FORWARD_ROWS):
                    part += teacher.mlp(index, teacher.normed(part, layer.post_attention_norm))
        return converted, fitted

    def one_layer(self, index, x, wanted, settings, stepped) -> tuple[dict, dict]:
        import torch

        seen = calibrate(self.teacher, index, x[CHECK_ROWS : CHECK_ROWS + CALIBRATION_ROWS])
        new = convert_attention(self.config, self.teacher.attention_weights(index), seen)
        error = attention_error(self.config, new.weights, x[:CHECK_ROWS], wanted[:CHECK_ROWS])
        stages = {"converted": new.weights}
        facts = {
            "rope_energy": new.rope_energy,
            "latent_energy": new.latent_energy,
            "converted": error,
        }
        if settings.steps:
            with torch.enable_grad():
                fitted = fit_attention(
                    self.config,
                    new.weights,
                    x[CHECK_ROWS:],
                    wanted[CHECK_ROWS:],
                    settings,
                    self.options.seed + index,
                    stepped,
                )
            stages["fitted"] = fitted
            facts["fitted"] = attention_error(self.config, fitted, x[:CHECK_ROWS], wanted[:CHECK_ROWS])
        return stages, facts

    def distill(self, model, rows: Int32[np.ndarray, "rows seq"]) -> None:
        options = self.options
        settings = AdamWSettings(options.distill_steps, options.distill_batch, options.distill_learning_rate)
        with _progress(self.console) as progress:
            bar = progress.add_task("distillation", total=settings.steps)

            def stepped(divergence: float) -> None:
                progress.update(bar, advance=1, description=f"distillation, KL {divergence:.3f}")

            compute = dataclasses.replace(self.compute, dtype=options.compute)
            saved = self.work.folder / "distillation.pt"
            divergences = distill(model, self.teacher, rows, settings, compute, saved, stepped)
        self.report["distillation"] = [round(value, 5) for value in divergences]

    def expert_values(
        self, dense: dict[str, np.ndarray], inputs: list[MlpInputs]
    ) -> Iterator[tuple[Parameter, np.ndarray]]:
        routers = [
            balanced_router(*statistics, self.config.n_routed_experts, self.options.seed, layer)
            for layer, statistics in enumerate(inputs)
        ]
        return upcycled_values(self.config, dense, routers, self.options.diversity, self.options.seed)

    # Measurements

    def hidden_of(self, model):
        return lambda tokens: model(tokens, self.compute).hidden

    def measure(self, stage: str, texts: Texts, hidden_of, embedding, made_by: str = "") -> None:
        """Losses of a stage on every text, or those that an interrupted run has measured before."""
        file = self.work.folder / f"losses-{stage}.json"
        sums = {name: [int(rows.inputs.sum()) for rows in by_length.values()] for name, by_length in texts.items()}
        identity = {"texts": sums, "made_by": made_by}
        with self.timed(f"measuring {stage}"):
            found = read_json(file) if file.exists() else {}
            if found.get("identity") != identity:
                found = {"identity": identity, "losses": losses_of(texts, hidden_of, embedding)}
                write_json(file, found)
        self.report["losses"][stage] = found["losses"]
        losses = [f"{loss:.4f}" for by_length in found["losses"].values() for loss in by_length.values()]
        self.console.print(f"{stage}: loss {' '.join(losses)}")

    def expert_load(self, model, rows: Int32[np.ndarray, "rows seq"]) -> list[float]:
        """Largest load over mean load, by layer."""
        import torch

        with torch.no_grad():
            counts = sum(model(torch.from_numpy(row)[None], self.compute).expert_counts for row in rows).double()
        return (counts.amax(1) / counts.mean(1)).tolist()


def losses_of(texts: Texts, hidden_of, embedding) -> dict[str, dict[str, float]]:
    """Mean loss in nats by text and row length."""
    return {
        name: {str(length): mean_loss(hidden_of, embedding, rows) for length, rows in by_length.items()}
        for name, by_length in texts.items()
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def parse(argv: Sequence[str] | None) -> WarmStartOptions:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(WarmStartOptions, prog="python -m train.warm_start", args=argv)
    except SystemExit as stop:
        if stop.code:
            raise UserError(first_sentence(said.getvalue())) from None
        raise


def main(argv: Sequence[str] | None = None) -> int:
    console = Console(stderr=True)
    try:
        options = parse(argv)
        if options.preset not in PRESETS:
            raise UserError(f"--preset {options.preset}: there are {', '.join(PRESETS)}")
        warm_start(options, PRESETS[options.preset], console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: start training with --preset {options.preset} --init-from {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
