"""Turn SmolLM2-135M (or another Llama of a preset's shape) into this model, in minutes on a CPU:

    python -m train.warm_start --from SmolLM2-135M.gguf --out warm
    python -m torch_ref.train --preset smol-774m-warm --init-from warm        or train.flax_main

Four stages (`stages.py`): each attention layer converted in closed form (`attention.py`), then fitted to the
old layer's output (`fit.py`); the dense model distilled as a whole; MLPs copied into experts (`experts.py`).
The folder that comes out loads in `transformers`; it also holds a table of losses and errors, and their plot.

An interrupted conversion goes on where it was: layers that are done lie in the folder `<out>.partial`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from torch_ref.spec.config import PRESETS, ModelConfig
from torch_ref.spec.huggingface import export_folder
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import fresh_folder, write_json
from train.data.feed import Data, open_data
from train.data.tokenizer import load_tokenizer
from train.shell import COMPLETE, parse_flags, shell
from train.warm_start.options import WarmStartOptions, check_options
from train.warm_start.report import draw, print_tables
from train.warm_start.stages import Stages, data_options
from train.warm_start.teacher import Teacher, check_shape, check_tokenizer, read_teacher
from train.warm_start.work import Work

REPORT = "warm_start.json"
PLOT = "warm_start.png"


def warm_start(options: WarmStartOptions, config: ModelConfig, console: Console) -> dict:
    """Make `options.out` and return the report that is stored in it as `warm_start.json`.

    Raises:
        UserError: the old model or its tokenizer does not fit, text is missing, or an option is out of range.
    """
    check_options(options, config)
    old_config, weights, own_tokenizer = read_teacher(options.source)
    check_shape(options.source, old_config, config)
    teacher = Teacher(old_config, weights)
    tokenizer = own_tokenizer
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        check_tokenizer(own_tokenizer, tokenizer)
    work = Work(options.out.with_name(options.out.name + ".partial"))
    tokenizer.save(work.folder / "tokenizer")
    data = open_data(data_options(options, config, work), work.folder / "data", resume=work.begun)
    work.claim(_identity(options, config, teacher, data))

    stages = Stages(options, config, teacher, tokenizer, data, work, console)
    values, report = stages.run(), stages.report
    print_tables(report, console)
    draw(report, work.folder / PLOT)
    write_json(work.folder / REPORT, report)
    with fresh_folder(options.out) as folder:  # whole or not at all: a folder without its report could not be mended
        export_folder(
            folder,
            config,
            values,
            dtype=options.dtype,
            tokenizer=work.folder / "tokenizer",
            end_of_text=tokenizer.eot_id,
        )
        for name in (PLOT, REPORT):
            (work.folder / name).rename(folder / name)
    work.remove()
    return report


def _identity(options: WarmStartOptions, config: ModelConfig, teacher: Teacher, data: Data) -> dict:
    """What the layers in a partial folder depend on."""
    shaping = "seq_len fit_rows fit_steps fit_batch fit_learning_rate seed".split()
    return {
        "model": config.to_dict(),
        "weights": teacher.fingerprint(),
        "data": {key: value for key, value in data.identity.items() if key != "versions"},
        "options": {name: getattr(options, name) for name in shaping},
    }


@shell
def main(argv: Sequence[str]) -> int:
    options = parse_flags(WarmStartOptions, "python -m train.warm_start", argv)
    if options.preset not in PRESETS:
        raise UserError(f"--preset {options.preset}: there are {', '.join(PRESETS)}")
    warm_start(options, PRESETS[options.preset], Console(stderr=True))
    print(f"{options.out}: start training with --preset {options.preset} --init-from {options.out}")
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
