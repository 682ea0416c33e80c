"""Is *your* model the same in JAX/Flax, in PyTorch and in `transformers`? Runs its very weights on your own text in all
three, and says where they part first.

    python -m parity_tests.check runs/tiny-flax                       the held-out rows of the run
    python -m parity_tests.check exported --data texts/*.txt          a transformers folder, on your text
    python -m parity_tests.check runs/tiny-flax --exported exported   is that folder still the run's model?
    python -m parity_tests.check runs/tiny-flax --steps 5             and do both train on alike, in float64?
    python -m parity_tests.check runs/tiny-torch --torch-device mps   across devices

MODEL is a run folder of either framework, a checkpoint, a neutral or `transformers` folder or a file of final weights.
The exit code is 1 if any measurement is beyond its bound. What is measured, and the bounds, are in docs/parity.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from parity_tests.harness.measure import Measurement, Outcome, relative_error
from parity_tests.report import Report, environment
from torch_ref.spec.config import ComputeConfig, SpecificationError
from torch_ref.spec.huggingface import changed_tensors, export_folder, import_folder, our_name
from torch_ref.spec.interface import IGNORE, Sampling, TrainingState, UserError
from torch_ref.spec.parameters import Parameter, parameter_table
from torch_ref.spec.training_state import LazyArrays
from train import command_line
from train.data.corpus import Reader
from train.data.feed import open_data
from train.data.packing import Rows, rows_of
from train.data.python_docs import python_docs_source
from train.data.sources import FileSource
from train.data.tokenizer import load_tokenizer
from train.run.launch import settle
from train.shell import shell
from train.state.card import PARITY_BEGIN, VERDICT, parity_section
from train.state.neutral import copy_run_files
from train.state.source import KINDS, Source, locate, open_state
from train.state.trained import open_in

RUNGS = {
    "round trip": "weights through Flax, torch and back: changed tensors",
    "export": "weights in the exported folder against the model's",
    "choices": "router choices beyond the score error, Flax and torch",
    "trace": "each module's output, torch against Flax",
    "hidden": "hidden state after every layer",
    "logits": "logits",
    "KL": "KL of the next-token distributions, nats",
    "loss": "loss, balance loss, objective, expert counts",
    "transformers choices": "router choices beyond the score error, transformers and torch",
    "transformers trace": "each module's output, transformers against torch",
    "transformers hidden": "hidden state after every layer",
    "transformers logits": "logits",
    "transformers KL": "KL of the next-token distributions, nats",
    "transformers loss": "next-token loss",
    "decode": "greedy tokens of the cache that logits without a cache would not choose",
    "training run": "float64: loss and gradient norm of each step, moments and weights",
}
"""In the order of the computation: the first beyond its bound names the place."""

NEW_TOKENS = 24
LONGEST_ROW = 512


@dataclasses.dataclass
class Checked:
    """A model, and the text it is checked on."""

    name: str
    """As it was called."""
    source: Source
    state: TrainingState
    rows: Rows
    text: str
    """In words."""

    @property
    def folder(self) -> Path | None:
        """The `transformers` folder that it was read from, if it was."""
        return self.source.path if self.source.kind == "transformers" else None

    def values(self, dtype: str = "float32") -> Iterator[tuple[Parameter, np.ndarray]]:
        wanted = "float64" if dtype == "float64" else "float32"
        return ((row, self.state.weights[row.name].astype(wanted)) for row in parameter_table(self.state.model_config))

    @property
    def dtypes(self) -> list[str]:
        """float32, and what the run computed in."""
        return list(dict.fromkeys(["float32", self.state.meta.get("options", {}).get("dtype", "float32")]))


# What to check


def open_model(model: Path, step: int | None, tokenizer: str | None, data: list[str], rows: int, seq: int) -> Checked:
    source = locate(model, step)
    state = open_state(source)
    seq = min(seq, state.model_config.max_position)
    found, text = _text(source, state, tokenizer, data, rows, seq)
    if not len(found.inputs):
        raise UserError("--data: no text in there")
    return Checked(str(model), source, state, Rows(found.inputs[:rows, :seq], found.targets[:rows, :seq]), text)


def _text(
    source: Source, state: TrainingState, tokenizer: str | None, data: list[str], rows: int, seq: int
) -> tuple[Rows, str]:
    """Rows of the user's text; else of what the run held out, of the Python documentation, or of random tokens."""
    run, room = source.run, rows * seq
    if not data and run is not None and (run / "validation.npz").is_file():
        with np.load(run / "validation.npz") as kept:
            return Rows(kept["inputs"], kept["targets"]), "the run's held-out rows"
    beside = run if run is not None and (run / "tokenizer.json").is_file() else None
    if tokenizer is None and beside is None:
        if data:
            raise UserError(f"--tokenizer: {source.path} has no tokenizer.json beside it; name a folder that has one")
        vocabulary = state.model_config.vocab_size
        return rows_of(np.random.default_rng(0).integers(0, vocabulary, room + 1), seq), "random tokens"
    encoder = load_tokenizer(tokenizer or str(beside))
    encoder.require_fit(state.model_config.vocab_size)
    tokens = [encoder.eot_id]
    with tempfile.TemporaryDirectory() as folder:
        sources = [FileSource(pattern, option="--data") for pattern in data]
        sources = sources or [python_docs_source(Path(folder) / "python-docs.jsonl")]
        for document in itertools.chain.from_iterable(map(Reader, sources)):
            tokens += [*encoder.encode(document.text), encoder.eot_id]
            if len(tokens) > room:
                break
    return rows_of(tokens[: room + 1], seq), ", ".join(data) or "the Python documentation"


def require_export(checked: Checked, folder: Path) -> None:
    """Raises `UserError` if the folder is of another model."""
    if import_folder(folder)[0].to_dict() != checked.state.model_config.to_dict():
        raise UserError(f"--exported: {folder} is of another model than {checked.name}; see its config.json")


def require_training_state(checked: Checked) -> None:
    """Raises `UserError` if training cannot go on from there."""
    run = checked.source.run
    if checked.state.first_moment is None or run is None or not (run / "settings.toml").is_file():
        raise UserError(f"--steps: {checked.name} is no training state in a run folder; give a run folder")


# The rungs


def changed_weights(*folders: Path | None) -> list[Measurement]:
    """The tensors of exported folders that are not what was exported, by their checksums."""
    return [
        Measurement("export", str(folder), "float32", f"{our_name(key)}, changed in {key}", float("inf"), 0.0)
        for folder in dict.fromkeys(filter(None, folders))
        for key in changed_tensors(folder)
    ]


def check_export(checked: Checked, folder: Path) -> list[Measurement]:
    """The tensors of a folder (`require_export`) against those that were written, and against the model's."""
    name, measurements = checked.name, changed_weights(checked.folder, folder)
    try:
        arrays = import_folder(folder)[1]
        for row, value in checked.values():
            try:
                got = arrays[row.name].astype(np.float32)
            except UserError as error:
                measurements.append(Measurement("export", name, "float32", str(error), float("inf"), 0.0))
                continue
            measurements.append(Measurement("export", name, "float32", row.name, relative_error(got, value), 0.0))
    except UserError as error:
        if not measurements:
            raise
        measurements.append(Measurement("export", name, "float32", str(error), float("inf"), 0.0))
    return sorted(measurements, key=lambda each: each.passed)


def measure(
    checked: Checked, exported: Path | None, torch_device: str, jax_platform: str, report: Report, say: Callable
) -> None:
    """Everything but the training run, one model in memory at a time."""
    from flax_model.device import resolve_compute as resolve_flax
    from flax_model.device import resolve_device as resolve_jax
    from parity_tests.harness import ladder
    from parity_tests.harness.cases import Case
    from parity_tests.harness.measure import run_flax, run_torch
    from torch_ref.device import resolve_compute as resolve_torch
    from torch_ref.device import resolve_device

    config = checked.state.model_config
    biases = {row.name: checked.state.weights[row.name] for row in parameter_table(config) if not row.trainable}
    table = [row.name for row in parameter_table(config)]
    weights = LazyArrays(table, lambda key: checked.state.weights[key].astype(np.float32))
    report.add(ladder.round_trip(config, "float32", checked.name, {"these weights": weights}), say)
    torch_place, jax_place = resolve_device(torch_device), resolve_jax(jax_platform)
    single: tuple[Case, Outcome] | None = None
    for dtype in checked.dtypes:
        torch_compute = resolve_torch(ComputeConfig(dtype=dtype), torch_place)
        flax_compute = resolve_flax(ComputeConfig(dtype=dtype, scan_layers=False), jax_place, config)
        rows, seq = checked.rows.inputs.shape
        case = Case(checked.name, config, torch_compute, flax_compute, rows=rows, seq=seq)
        settings = {"trace": True, "gradients": False}
        torch = run_torch(case, checked.values(dtype), *checked.rows, device=str(torch_place), **settings)

        def in_flax(forced=None, case=case, dtype=dtype, settings=settings):
            values = checked.values(dtype)
            return run_flax(case, values, *checked.rows, device=jax_place, forced_choices=forced, **settings)

        flax = in_flax()
        report.add(ladder.compare_choices(case, torch, flax, biases), say)
        if not ladder.choose_alike(torch, flax):
            flax = in_flax(torch.choices)  # what follows a choice that rounding made differs rightly
        report.add(ladder.compare(case, torch, flax), say)
        if dtype == "float32":
            single = case, torch
    judge = _judged(checked, exported, torch_device, *single, biases, report, say)
    report.add(_decoding(checked, single[0], torch_device, jax_platform, judge), say)


def _judged(
    checked: Checked, exported: Path | None, device: str, case, torch: Outcome, biases, report: Report, say: Callable
) -> Callable[[list[int]], list[int]] | None:
    """`transformers` on the exported folder, or on one that is made for it; returns its greedy decoding of a prompt,
    done already. None where `transformers` cannot run the model."""
    from parity_tests.harness import ladder
    from parity_tests.harness.judge import Judge

    with tempfile.TemporaryDirectory() as temporary:
        folder = exported or Path(temporary) / "exported"
        if exported is None:
            try:
                export_folder(folder, case.config, checked.values(), end_of_text=0)
            except UserError as error:
                say(f"     transformers: not compared: {error}")
                return None
        report.add(check_export(checked, folder), say)
        judge = Judge(folder, device)
        theirs, ours = judge.run(*checked.rows, torch)
        choices = ladder.compare_choices(case, ours, theirs, biases)
        report.add([dataclasses.replace(each, rung="transformers choices") for each in choices], say)
        if not ladder.choose_alike(ours, theirs):
            theirs, ours = judge.run(*checked.rows, torch, forced=True)
        report.add(ladder.compare_outputs(case, theirs, ours, "transformers "), say)
        prompt = _prompt(checked)
        tokens = judge.greedy(prompt, _new_tokens(checked))
        return lambda prompt: tokens


def _prompt(checked: Checked) -> list[int]:
    return checked.rows.inputs[0, :16].tolist()


def _new_tokens(checked: Checked) -> int:
    return min(NEW_TOKENS, checked.state.model_config.max_position - len(_prompt(checked)))


def _decoding(checked: Checked, case, torch_device: str, jax_platform: str, judge) -> list[Measurement]:
    """Greedy tokens of each framework's cache: how many the logits without a cache, by torch, would not choose. What is
    within their error of the highest is a choice of rounding, and so is all that follows experts chosen by it."""
    from parity_tests.harness.ladder import FORWARD, choice_margin
    from parity_tests.harness.measure import run_torch

    prompt, new = _prompt(checked), _new_tokens(checked)
    if new < 1:
        return []
    sampling = Sampling(max_new_tokens=new, greedy=True, stop_token=None)
    state = dataclasses.replace(
        checked.state, weights={row.name: value for row, value in checked.values()}, first_moment=None
    )
    texts = {}
    for framework, device in (("torch", torch_device), ("flax", "auto" if jax_platform == "gpu" else jax_platform)):
        texts[framework] = open_in(framework, state, "float32", device)[1]([prompt], sampling, 0)[0]
    if judge is not None:
        texts["transformers"] = judge(prompt)
    tokens = np.array([prompt + text for text in texts.values()], np.int32)
    targets = np.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    outcome = run_torch(case, checked.values(), tokens, targets, device=torch_device, trace=True, gradients=False)
    bound = FORWARD["float32"]
    unsure = np.zeros(tokens.size, bool)
    for name in (name.removesuffix(".scores") for name in outcome.trace if name.endswith("router.scores")):
        scores = outcome.trace[f"{name}.scores"] + checked.state.weights[f"{name}.balance_bias"]
        unsure |= choice_margin(scores, checked.state.model_config.num_experts_per_tok) <= bound
    sure = np.cumsum(unsure.reshape(tokens.shape), axis=1) == 0
    measurements = []
    for framework, logits, row, known in zip(texts, outcome.logits, tokens, sure, strict=True):
        before = logits[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(before, row[len(prompt) :, None], 1)[:, 0]
        wrong = before.max(-1) - chosen > 2 * bound * np.abs(logits).max()
        judged = known[len(prompt) - 1 : -1]
        wrong &= judged
        where = f"{framework}, of {judged.sum()} judged of {len(wrong)}"
        measurements.append(Measurement("decode", checked.name, "float32", where, float(wrong.sum()), 0.0))
    return measurements


def measure_training(checked: Checked, steps: int, report: Report, say: Callable) -> None:
    """Both frameworks go on from the run's state (`require_training_state`) on its next batches."""
    from parity_tests.harness import training

    state, run = checked.state, checked.source.run
    options = command_line.parse(["--config", str(run / "settings.toml")], "python -m parity_tests.check")
    options = settle(options, "float64", None)
    with tempfile.TemporaryDirectory() as folder:
        copy_run_files(run, Path(folder))
        data = open_data(options.data, Path(folder), resume=True)
        with closing(data.batches(state.meta["progress"]["cursor"])) as following:
            batches = [(batch.inputs, batch.targets) for batch in itertools.islice(following, steps)]
    separator = data.tokenizer.eot_id if options.document_mask else None
    divergence, measurements = training.trajectory(state, options.optimizer, batches, checked.name, separator)
    report.divergences["float64"] = divergence
    report.add(measurements, say)


# What comes of it


def first_place(report: Report) -> Measurement | None:
    """The first measurement beyond its bound."""
    return next((each for each in report.measurements if not each.passed), None)


def verdict(report: Report, checked: Checked) -> str:
    """For the terminal and the model card, in Markdown."""
    from parity_tests.harness import page

    place = first_place(report)
    said = page.summary(report)
    if place is not None:
        return f"**No.** They part first here: {place}. {said[0].upper()}{said[1:]}."
    errors = [
        f"{rung} {page.number(max(each.error for each in report.of(rung, 'float32')))}"
        for rung in ("logits", "KL", "transformers logits", "transformers KL")
        if report.of(rung, "float32")
    ]
    size = " x ".join(map(str, checked.rows.inputs.shape))
    return f"**Yes, to rounding.** {said}. float32, {size} tokens: {', '.join(errors)}."


def write(report: Report, checked: Checked, exported: Path | None, folder: Path) -> None:
    """The page, and the verdict where `train.convert` and an export's model card have it from: that of the model alone
    for the former, that of the folder it was compared with for its card."""
    from parity_tests.harness import page

    page.write(report, folder)
    text = verdict(report, checked)
    content = {"step": checked.state.step, "passed": report.passed, "text": text}
    if exported == checked.folder:
        (folder / VERDICT.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if exported is not None and (exported / "README.md").is_file():
        card = exported / "README.md"
        before = card.read_text(encoding="utf-8")
        if PARITY_BEGIN in before:
            card.write_text(page.replace_between_markers(before, text), encoding="utf-8")
            assert parity_section(text) in card.read_text(encoding="utf-8")


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.check",
        description=__doc__.split("\n\n")[0].replace("\n", " "),
    )
    parser.add_argument("model", type=Path, help=f"The model: {KINDS}.")
    parser.add_argument("--data", nargs="+", default=[], help="Text files, folders or globs; by default held-out rows.")
    parser.add_argument(
        "--exported", type=Path, help="A transformers folder to compare it with; by default a fresh one."
    )
    parser.add_argument("--step", type=int, help="The step of the checkpoint in a run folder; by default the latest.")
    parser.add_argument(
        "--tokenizer", help="The tokenizer's folder or name on the Hub; by default the one beside the model."
    )
    parser.add_argument("--rows", type=int, default=2, help="Number of rows of text; by default %(default)s.")
    parser.add_argument(
        "--seq-len", type=int, default=LONGEST_ROW, help="Tokens in a row, at most; by default %(default)s."
    )
    parser.add_argument("--steps", type=int, default=0, help="Also train so many steps in float64 on the next batches.")
    parser.add_argument(
        "--torch-device", default="cpu", help="Torch's device: cpu, cuda or mps; by default %(default)s."
    )
    parser.add_argument("--jax-platform", default="cpu", help="JAX's platform: cpu or gpu; by default %(default)s.")
    parser.add_argument(
        "--out", type=Path, help="The page's folder; by default parity, in the run or beside the model."
    )
    options, changed = parser.parse_args(argv), []
    try:
        for package in ("torch", "flax", "transformers"):
            __import__(package)
        if options.rows < 1 or options.seq_len < 2:
            raise UserError("--rows, --seq-len: must be at least 1 and 2")
        if options.steps < 0:
            raise UserError(f"--steps {options.steps}: must be at least 1, or 0 for none")
        started = time.monotonic()
        own = options.model if (options.model / "config.json").is_file() else None
        changed = changed_weights(own, options.exported)
        checked = open_model(
            options.model, options.step, options.tokenizer, options.data, options.rows, options.seq_len
        )
        exported = options.exported or checked.folder
        if exported is not None:
            require_export(checked, exported)
        if options.steps:
            require_training_state(checked)
        report = Report(
            environment(options.torch_device, options.jax_platform),
            rungs=RUNGS,
            heading=f"Is {checked.name} the same model everywhere?",
            traced=checked.name,
        )
        size = " x ".join(map(str, checked.rows.inputs.shape))
        report.environment |= {"model": str(checked.source.path), "text": f"{checked.text}, {size} tokens"}
        print(f"{checked.name}, on {checked.text}, {size} tokens")
        measure(checked, exported, options.torch_device, options.jax_platform, report, say=print)
        if options.steps:
            measure_training(checked, options.steps, report, say=print)
        report.environment["took"] = f"{time.monotonic() - started:.0f} s"
        out = options.out or (checked.source.run or checked.source.path.parent) / VERDICT.parent
        write(report, checked, exported, out)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: the check runs the model in all three") from error
    except (UserError, SpecificationError) as error:
        if changed:  # so that it is no model any more
            print(f"No. They part first here: {changed[0]}. {error}")
            return 1
        raise
    print(f"Wrote {out / 'index.html'} and {out / 'report.md'}")
    print(verdict(report, checked).replace("**", ""))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
