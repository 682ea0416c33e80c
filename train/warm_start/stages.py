"""The stages of a warm start in their order, and what is measured after each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int32
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import Parameter
from torch_ref.spec.storage import read_json, write_json
from train.data.corpus import Reader, open_source
from train.data.feed import Data
from train.data.options import DataOptions
from train.data.packing import Rows, rows_of
from train.data.tokenizer import TextTokenizer
from train.warm_start.attention import convert_attention
from train.warm_start.experts import balanced_router, upcycled_values
from train.warm_start.fit import (
    AdamWSettings,
    Distillation,
    MlpInputs,
    attention_error,
    calibrate,
    dense_values,
    distill,
    fit_attention,
    mean_loss,
    mlp_inputs,
)
from train.warm_start.options import WarmStartOptions
from train.warm_start.teacher import Teacher
from train.warm_start.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from torch_ref.model import Model

CALIBRATION_ROWS = 8
"""Fit rows that the closed form takes its statistics from."""
CHECK_ROWS = 4
"""Held-out rows, at most, that a layer's error is measured on."""
JUDGE_SHARE = 8
"""One in so many fit rows is not learned from, but decides whether the fit was a gain."""
FORWARD_ROWS = 8
"""Rows that go through a teacher's layer together."""
Texts = dict[str, dict[int, Rows]]
"""Rows to measure on, by text and length: the same tokens at every length."""
HiddenOf = Callable[["Tensor"], "Tensor"]
"""Final hidden states of token rows."""
LayerWeights = dict[str, np.ndarray]
"""The tensors of one latent attention by their names within the layer."""


def data_options(options: WarmStartOptions, config: ModelConfig, work: Work) -> DataOptions:
    """Text to fit on in rows of `seq_len`, and held-out rows to measure on."""
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


@dataclass
class Stages:
    """The stages in their order, and the report that they fill."""

    options: WarmStartOptions
    config: ModelConfig
    teacher: Teacher
    tokenizer: TextTokenizer
    data: Data
    work: Work
    console: Console
    report: dict = field(default_factory=lambda: {"losses": {}, "layers": [], "seconds": {}})
    compute: ComputeConfig = ComputeConfig(attention="sdpa", moe="grouped")

    @property
    def dense(self) -> ModelConfig:
        """The new model before its experts: latent attention and the old MLPs."""
        sizes = {"first_k_dense": self.config.num_layers, "intermediate_size": self.config.moe_intermediate_size}
        return dataclasses.replace(self.config, **sizes)

    def run(self) -> Iterator[tuple[Parameter, np.ndarray]]:
        """Every tensor of the new model, made as it is asked for; the report is full when this returns."""
        from torch_ref.model import Model

        options, report = self.options, self.report
        texts = self.texts()
        rows = self.training_rows()
        self.measure("original", texts, self.teacher.hidden, self.teacher.embedding)

        with self.timed("layers"):
            converted, fitted = self.layers(rows.inputs[: options.fit_rows])
        model = Model(self.dense)
        for stage, attention in (("converted", converted), ("fitted", fitted)):
            if attention[0] is not None:
                model.load_values(dense_values(self.dense, self.teacher, attention))
                self.measure(stage, texts, self.hidden_of(model), model.embed_tokens.weight)
        if options.distill_steps:
            with self.timed("distillation"):
                self.distill(model, Rows(*(part[options.fit_rows :] for part in rows)))
            names = [name for name in vars(options) if "distill" in name or name == "compute"]
            made_by = " ".join(f"{name}={getattr(options, name)}" for name in names)
            self.measure("distilled", texts, self.hidden_of(model), model.embed_tokens.weight, made_by)

        inputs = mlp_inputs(model, rows.inputs[:CALIBRATION_ROWS], self.compute)
        dense = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        experts = Model(self.config).load_values(self.expert_values(dense, inputs))
        with self.timed("measuring experts"):
            report["losses"]["experts"] = losses_of(texts, self.hidden_of(experts), experts.embed_tokens.weight)
            report["expert_load"] = self.expert_load(experts, rows.inputs[:CALIBRATION_ROWS])
        del experts
        report["options"] = {name: str(value) for name, value in vars(options).items()}
        return self.expert_values(dense, inputs)

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
        own = [int(held_out.inputs[0, 0]), *held_out.targets.ravel()[scored].tolist()]
        tokens = {self.options.dataset: own[: self.options.measure_tokens + 1]}
        for name in self.options.also_measure:
            tokens[name] = self.tokens_of(name)
        return {
            name: {length: rows_of(text, length) for length in self.options.measure_lengths}
            for name, text in tokens.items()
        }

    def tokens_of(self, dataset: str) -> list[int]:
        """The first tokens of a text, documents whole but the last."""
        folder, option = self.work.folder / "measured", "--also-measure"
        source = open_source(dataset, None, None, self.options.text_field, folder, False, option=option)
        tokens = [self.tokenizer.eot_id]
        for document in Reader(source):
            tokens += [*self.tokenizer.encode(document.text), self.tokenizer.eot_id]
            if len(tokens) > self.options.measure_tokens:
                break
        if len(tokens) == 1:
            raise UserError(f"--also-measure {dataset}: no text in there")
        return tokens[: self.options.measure_tokens + 1]

    def training_rows(self) -> Rows:
        """Rows for the layers' fit, and after them those of the distillation."""
        count = self.options.fit_rows + self.options.distill_steps * self.options.distill_batch
        batches = self.data.batches()
        rows = [(batch.inputs[0], batch.targets[0]) for batch in itertools.islice(batches, count)]
        batches.close()
        return Rows(*map(np.stack, zip(*rows, strict=True)))

    # Stages

    def layers(self, rows: Int32[np.ndarray, "rows seq"]) -> tuple[list[LayerWeights], list[LayerWeights]]:
        """Every layer's attention, converted and fitted (if it is), on the old model's own activations."""
        import torch

        options, teacher = self.options, self.teacher
        check = self.data.validation.inputs[:CHECK_ROWS]
        hidden = teacher.embedding[torch.from_numpy(np.concatenate([check, rows])).long()]
        rotation = teacher.rotation(rows.shape[1])
        settings = AdamWSettings(options.fit_steps, options.fit_batch, options.fit_learning_rate)
        count = len(teacher.layers)
        missing = [index for index in range(count) if not self.work.has_layer(index)]
        with _progress(self.console) as progress, torch.no_grad():
            bar = progress.add_task("attention layers", total=count * (options.fit_steps + 1))
            for index in range(max(missing, default=-1) + 1):
                layer = teacher.layers[index]
                x = teacher.normed(hidden, layer.input_norm)
                wanted = torch.cat([teacher.attention(index, part, rotation) for part in x.split(FORWARD_ROWS)])
                if index in missing:
                    done = self.one_layer(index, x, wanted, len(check), settings, lambda: progress.advance(bar))
                    self.work.save_layer(index, *done)
                progress.update(bar, completed=(index + 1) * (options.fit_steps + 1))
                hidden += wanted
                for part in hidden.split(FORWARD_ROWS):
                    part += teacher.mlp(index, teacher.normed(part, layer.post_attention_norm))
        weights, self.report["layers"] = zip(*map(self.work.layer, range(count)), strict=True)
        return [stages["converted"] for stages in weights], [stages.get("fitted") for stages in weights]

    def one_layer(
        self,
        index: int,
        x: Float[Tensor, "rows seq hidden"],
        wanted: Float[Tensor, "rows seq hidden"],
        checked: int,
        settings: AdamWSettings,
        stepped: Callable[[], None],
    ) -> tuple[dict[str, LayerWeights], dict[str, float]]:
        """Weights by stage and measurements of one layer; the first `checked` rows are held out."""
        import torch

        seen = calibrate(self.teacher, index, x[checked : checked + CALIBRATION_ROWS])
        new = convert_attention(self.config, self.teacher.attention_weights(index), seen)
        error = attention_error(self.config, new.weights, x[:checked], wanted[:checked])
        stages = {"converted": new.weights}
        facts = {
            "rope_energy": new.rope_energy,
            "latent_energy": new.latent_energy,
            "converted": error,
        }
        if settings.steps:
            judged = (len(x) - checked) // JUDGE_SHARE
            learned, judge = slice(checked, len(x) - judged), slice(len(x) - judged if judged else checked, None)
            with torch.enable_grad():
                fitted = fit_attention(
                    self.config,
                    new.weights,
                    x[learned],
                    wanted[learned],
                    settings,
                    self.options.seed + index,
                    stepped,
                )
            # A layer that the closed form has nearly right can lose by the fit's noise: it is then left as it was. So
            # is one whose fit diverged: its error, NaN, is below no other.
            candidates = (new.weights, fitted)
            stages["fitted"] = min(
                candidates, key=lambda one: attention_error(self.config, one, x[judge], wanted[judge])
            )
            facts["fitted"] = attention_error(self.config, stages["fitted"], x[:checked], wanted[:checked])
        return stages, facts

    def distill(self, model: Model, rows: Rows) -> None:
        options = self.options
        adamw = AdamWSettings(options.distill_steps, options.distill_batch, options.distill_learning_rate)
        settings = Distillation(adamw, options.distill_mlp_learning_rate, options.distill_text_weight)
        with _progress(self.console) as progress:
            bar = progress.add_task("distillation", total=adamw.steps)

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

    def hidden_of(self, model: Model) -> HiddenOf:
        return lambda tokens: model(tokens, self.compute).hidden

    def measure(self, stage: str, texts: Texts, hidden_of: HiddenOf, embedding: Tensor, made_by: str = "") -> None:
        """Losses of a stage on every text, or those that an interrupted run has measured before. Raises `UserError`
        where one is not finite: nothing that comes of such a model is worth keeping."""
        file = self.work.folder / f"losses-{stage}.json"
        sums = {
            name: {str(length): int(rows.inputs.sum()) for length, rows in by_length.items()}
            for name, by_length in texts.items()
        }
        identity = {"texts": sums, "made_by": made_by}
        with self.timed(f"measuring {stage}"):
            found = read_json(file) if file.exists() else {}
            if found.get("identity") != identity:
                found = {"identity": identity, "losses": losses_of(texts, hidden_of, embedding)}
                write_json(file, found)
        self.report["losses"][stage] = found["losses"]
        losses = [loss for by_length in found["losses"].values() for loss in by_length.values()]
        self.console.print(f"{stage}: loss {' '.join(f'{loss:.4f}' for loss in losses)}")
        if not np.isfinite(losses).all():
            cause = {"original": f"--from {self.options.source}", "distilled": "--distill-learning-rate is too high"}
            raise UserError(f"{cause.get(stage, stage)}: the loss of the {stage} model is not finite")

    def expert_load(self, model: Model, rows: Int32[np.ndarray, "rows seq"]) -> list[float]:
        """Largest load over mean load, by layer."""
        import torch

        with torch.no_grad():
            counts = sum(model(torch.from_numpy(row)[None], self.compute).expert_counts for row in rows).double()
        return (counts.amax(1) / counts.mean(1)).tolist()


def losses_of(texts: Texts, hidden_of: HiddenOf, embedding: Tensor) -> dict[str, dict[str, float]]:
    """Mean loss in nats by text and row length."""
    return {
        name: {str(length): mean_loss(hidden_of, embedding, rows) for length, rows in by_length.items()}
        for name, by_length in texts.items()
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
