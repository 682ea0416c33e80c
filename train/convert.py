"""Convert a training state, or weights, from one form to another:

    python -m train.convert runs/tiny-torch runs/tiny-flax --to flax            go on with the other framework
    python -m train.convert runs/tiny-torch state --to neutral                  for a machine with neither
    python -m train.convert runs/tiny-torch exported --to transformers          for `AutoModelForCausalLM`
    python -m train.convert exported weights --to torch                         a state dict

SOURCE is a run folder, a checkpoint, a neutral folder, a `transformers` folder or a file of final weights. A whole
state (moments, step counters, balance bias, data cursor, early stopping, settings) becomes a run folder that the other
main resumes; weights alone become that framework's file of final weights, for `--init-from`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.huggingface import SIDECAR, export_folder
from torch_ref.spec.huggingface_config import read_config
from torch_ref.spec.huggingface_engines import engines
from torch_ref.spec.interface import Backend, OptimizerConfig, TrainingState, UserError
from torch_ref.spec.parameters import parameter_table
from torch_ref.spec.storage import fresh_folder, read_json, user_path, write_json
from train.data.tokenizer import load_tokenizer
from train.run.loop import FINAL_WEIGHTS
from train.shell import COMPLETE, shell
from train.state.card import model_card
from train.state.neutral import copy_run_files, write_state, write_tensors
from train.state.source import KINDS, Source, locate, open_state

FORMS = ("flax", "torch", "neutral", "transformers")


def convert(source: Path, target: Path, form: str, dtype: str | None = None, step: int | None = None) -> Source:
    """Write what `source` holds to the new folder `target`; returns what was taken.

    Args:
        form: one of `FORMS`.
        dtype: of the tensors; None keeps the type they have, as a whole state must. `bfloat16` is for `transformers`
            alone.
        step: which checkpoint of a run folder; None takes the latest.

    Raises:
        UserError: the source cannot be read, the target is in use, or the form needs what is not there.
    """
    found = locate(source, step)
    state = open_state(found)
    if dtype == "bfloat16" and form != "transformers":
        raise UserError(
            f"--dtype bfloat16: a training state needs float32; only --to transformers can take it (not {form})"
        )
    whole = form != "transformers" and state.first_moment is not None
    if whole and dtype not in (None, stored_dtype(state)):
        raise UserError(
            f"--dtype {dtype}: a training state goes on in the {stored_dtype(state)} it has; give no --dtype, or for "
            "weights alone take a file of final weights or --to transformers"
        )
    if form == "transformers":
        _write_transformers(target, state, found, dtype)
    elif form == "neutral":
        write_state(target, state, found.run, dtype)
    elif state.first_moment is None:
        _write_weights(target, state, found.run, form, dtype)
    else:
        _write_run(target, state, found.run, form)
    return found


def _write_transformers(target: Path, state: TrainingState, source: Source, dtype: str | None) -> None:
    run = source.run
    tokenizer = run if run is not None and (run / "tokenizer.json").is_file() else None
    end_of_text = _stated_end(source) if tokenizer is None else load_tokenizer(str(tokenizer)).eot_id
    values = ((row, state.weights[row.name]) for row in parameter_table(state.model_config))
    export_folder(
        target,
        state.model_config,
        values,
        dtype=dtype or stored_dtype(state),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
        card=model_card(state, run),
        add_special_tokens=source.kind == "transformers",
    )


def _stated_end(source: Source) -> int:
    """The end of text of weights without a tokenizer: what their config.json says, or else id 0."""
    said = read_json(source.path / "config.json").get("eos_token_id") if source.kind == "transformers" else None
    first = said[0] if isinstance(said, list) and said else said
    return first if type(first) is int and first >= 0 else 0


def stored_dtype(state: TrainingState) -> str:
    """Type of a state's tensors: `float32`, or `float64` of a float64 run."""
    return str(state.weights["norm.weight"].dtype)


def _write_run(target: Path, state: TrainingState, run: Path | None, framework: str) -> None:
    """A run folder with one checkpoint."""
    with fresh_folder(target) as folder, closing(_backend(framework, state)) as backend:
        backend.load_state(state)
        backend.save(folder / "checkpoints", f"step_{state.step}", state.meta)
        backend.wait()
        if run is not None:
            copy_run_files(run, folder)


def _write_weights(target: Path, state: TrainingState, run: Path | None, framework: str, dtype: str | None) -> None:
    """A folder with final weights as the main of that framework writes them, and the model's sizes beside them."""
    with fresh_folder(target) as folder:
        rows = parameter_table(state.model_config)
        if framework == "torch":
            with _needs("torch"):
                import torch

                from torch_ref.checkpoint import write_tensors as write_torch

            cast = getattr(torch, dtype or stored_dtype(state))
            tensors = {row.name: torch.from_numpy(state.weights[row.name]).to(cast) for row in rows}
            write_torch(folder / f"{FINAL_WEIGHTS}.pt", tensors)
        else:
            write_tensors(folder / f"{FINAL_WEIGHTS}.safetensors", rows, state.weights, dtype)
        write_json(folder / SIDECAR, {"model": state.model_config.to_dict()})
        if run is not None:
            copy_run_files(run, folder)


@contextmanager
def _needs(framework: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        message = f"--to {framework}: {error.name} is not installed; --to neutral needs neither framework"
        raise UserError(message) from None


def _backend(framework: str, state: TrainingState) -> Backend:
    """A backend that holds a state and does not train."""
    compute = ComputeConfig(dtype=stored_dtype(state))
    optimizer = OptimizerConfig(schedule=lambda step: 0.0)
    with _needs(framework):
        if framework == "torch":
            from torch_ref.backend import TorchBackend

            return TorchBackend(state.model_config, compute, optimizer, "cpu")
        from flax_model.backend import FlaxBackend

        return FlaxBackend(state.model_config, compute, optimizer, "cpu")


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.convert",
        description="Convert a training state or weights between Flax, torch, a neutral form and transformers.",
    )
    parser.add_argument("source", type=user_path, help=f"What to convert: {KINDS}.")
    parser.add_argument("target", type=user_path, help="A new folder to write to.")
    parser.add_argument("--to", required=True, choices=FORMS, help="The form to write it in.")
    parser.add_argument("--step", type=int, help="The step of the checkpoint in a run folder; by default the latest.")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="Precision of the tensors written; by default as they are stored, which a whole state must keep.",
    )
    arguments = parser.parse_args(argv)
    # Nothing is computed, and JAX would take most of a GPU's memory, which a run may be training in.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        found = convert(arguments.source, arguments.target, arguments.to, arguments.dtype, arguments.step)
    except OSError as error:
        raise UserError(str(error)) from error
    print(f"{found.path} ({found.kind}) -> {arguments.target} ({arguments.to})")
    if arguments.to == "transformers":
        for engine in engines(read_config(arguments.target)):
            print(f"  {engine}")
    if (arguments.target / "checkpoints").is_dir():
        main_module = {"flax": "train.flax_main", "torch": "torch_ref.train"}[arguments.to]
        # Not by its settings.toml: that of an earlier version holds what `auto` chose for the devices it leaves.
        folder = shlex.quote(str(arguments.target))
        print(f"Go on with: python -m {main_module} --resume-from {folder} --run-dir {folder}")
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
