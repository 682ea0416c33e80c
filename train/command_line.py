"""Options from a preset, a TOML file and the command line, in this order of precedence: preset < `--config FILE.toml`
< flags. `--init-from` brings its model's sizes and its tokenizer in place of the preset's, `--resume-from` its
settings; either may stand in the file, too. Every mistake is refused in one line that names the option or the file.

`python -m train.command_line` prints the table of settings in docs/settings.md.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
import tomllib
import types
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from torch_ref.spec.config import PRESETS, ModelConfig, SpecificationError
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import user_path
from train.run.options import GROUPS, OF_ONE_START, REPEATED, SECTIONS, Options, RunOptions, flag
from train.shell import parse_flags
from train.state.source import config_of, locate, settings_of


def parse(argv: Sequence[str], prog: str) -> Options:
    """Options from the command line, with preset and config file below it. Raises `UserError`; `--help` exits."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--steps", "--tokens"):
        early.add_argument(name, nargs="?")  # without a value: tyro says what is wrong
    for name in ("--config", "--init-from", "--resume-from"):
        early.add_argument(name, nargs="?", type=user_path)
    argv = [hyphenated(word) for word in argv]
    chosen, _ = early.parse_known_args(argv)
    file_values = _read_toml(chosen.config) if chosen.config else {}
    for source, given in (("--tokens", vars(chosen)), (str(chosen.config), file_values)):
        if given.get("tokens") is not None and given.get("steps") is not None:
            raise UserError(f"{source}: tokens and steps both set the length of the main phase; give one of them")
    if chosen.steps is not None:
        file_values.pop("tokens", None)
    in_file = {name: file_values[name] for name in ("init_from", "resume_from") if name in file_values}
    origins = {name: user_path(path) for name, path in _checked(in_file, Options, str(chosen.config)).items()}
    init_from = chosen.init_from or origins.get("init_from")
    resume_from = chosen.resume_from or origins.get("resume_from")
    values = preset_values(chosen.preset or file_values.pop("preset", RunOptions.preset))
    if init_from:
        values["model"] = config_of(init_from)  # sizes given below must then agree, or `read_start` refuses
        run = locate(init_from).run
        if run is not None and (run / "tokenizer.json").is_file():
            values["tokenizer"] = str(run)  # the weights know its tokens by their numbers
    if resume_from:
        stored = settings_of(resume_from)
        values = _overlay(values, {k: v for k, v in stored.items() if k in CARRIED}, str(resume_from))
        values["model"] = config_of(resume_from)
    values = _overlay(values, file_values, str(chosen.config))
    return _parse_flags(argv, prog, values)


def hyphenated(word: str) -> str:
    """A flag in the one spelling: `--init-from` for `--init_from`, which tyro takes too."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


CARRIED = {"preset", "seed", "dtype"} | {field.name for group in SECTIONS[2:] for field in dataclasses.fields(group)}
CARRIED -= set(OF_ONE_START)
"""Settings that a checkpoint brings along: all but where files go, how a device computes and what limits one start."""


def preset_values(preset: str) -> dict[str, Any]:
    """Values for `Options` of a preset. Raises `UserError` listing the presets when there is none of that name."""
    folder = resources.files("train") / "presets"
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if preset not in names:
        raise UserError(f"--preset {preset}: there are {', '.join(names)}")
    toml = tomllib.loads((folder / f"{preset}.toml").read_text(encoding="utf-8"))
    return _overlay({"preset": preset}, toml, f"preset {preset}")


def _overlay(values: dict[str, Any], layer: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` with a TOML document over it. In `[model]`, `preset` names sizes that the other keys then override."""
    layer = dict(layer)
    sizes = layer.pop("model", {})
    if not isinstance(sizes, dict):
        raise UserError(f"{source}: model must be a table [model]")
    sizes = dict(sizes)
    model = values.get("model", ModelConfig())
    if "preset" in sizes:
        name = sizes.pop("preset")
        if not isinstance(name, str) or name not in PRESETS:
            raise UserError(f"{source}: [model] preset {name!r}: there are {', '.join(PRESETS)}")
        model = PRESETS[name]
    try:
        model = dataclasses.replace(model, **_checked(sizes, ModelConfig, f"{source} [model]"))
    except SpecificationError as error:
        raise UserError(f"{source} [model]: {error}") from None
    return values | _checked(layer, Options, source) | {"model": model}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not TOML: {error}") from None
    if "config" in values:
        raise UserError(f"--config {path}: config: a file of settings cannot name another; put all into one")
    return values


def _checked(values: dict[str, Any], owner: type, source: str) -> dict[str, Any]:
    """TOML values with the types of `owner`'s fields. Raises `UserError` naming an unknown key or a wrong type."""
    hints = get_type_hints(owner)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{source}: unknown setting {name!r}{_did_you_mean(name, hints)}")
        for hint in _alternatives(hints[name]):
            if get_origin(hint) is tuple:
                member, members = get_args(hint)[0], value if isinstance(value, list) else [value]
                if all(type(one) is member or (member is float and type(one) is int) for one in members):
                    checked[name] = tuple(member(one) for one in members)
                continue
            if get_origin(hint) is Literal and value in get_args(hint) or type(value) is hint:
                checked[name] = value
            elif hint is float and type(value) is int:
                checked[name] = float(value)
            elif hint is Path and type(value) is str:
                checked[name] = Path(value)
        if name not in checked:
            expected = " or ".join(map(_in_words, _alternatives(hints[name])))
            raise UserError(f"{source}: {name} = {json.dumps(value, default=str)}: must be {expected}")
    return checked


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the one type."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(member for member in members if member is not type(None))


def _in_words(hint: Any) -> str:
    """What a value in TOML must be."""
    if get_origin(hint) is Literal:
        return " or ".join(map(json.dumps, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{_in_words(get_args(hint)[0])} or a list of them"
    return hint.__name__


def _parse_flags(argv: Sequence[str], prog: str, values: dict[str, Any]) -> Options:
    """`values` with the flags of `argv` over them. To tyro each group is a nested dataclass, which is how `--help`
    gets a heading per group; the group's name is left out of the flags."""
    groups = {group.__name__.removesuffix("Options").removesuffix("Config").lower(): group for group in GROUPS}
    arguments = dataclasses.make_dataclass("Arguments", groups.items(), frozen=True)
    # tyro would add to the defaults of what is repeated: they are put in where no such flag is given.
    empty = dict.fromkeys(REPEATED, ())
    defaults = [
        group(**{name: value for name, value in {**values, **empty}.items() if name in group.__dataclass_fields__})
        for group in SECTIONS
    ]
    parsed, unknown = parse_flags(
        arguments,
        prog,
        argv,
        description="Train the model. The same command again resumes the run.",
        default=arguments(*defaults, values["model"]),
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if unknown:
        flags = [flag(field.name) for group in GROUPS for field in dataclasses.fields(group)]
        raise UserError(f"unknown option {unknown[0]}{_did_you_mean(unknown[0], flags)}; --help lists them all")
    *sections, model = (getattr(parsed, name) for name in groups)
    given = {name: value for section in sections for name, value in vars(section).items() if value or name not in empty}
    return Options(**{name: values[name] for name in empty if name in values} | given, model=model)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def settings_table() -> str:
    """The table in docs/settings.md: flag, default, meaning, and a star where a resumed run must not change it."""
    lines = []
    for group in GROUPS:
        described = field_docstrings(group)
        lines += [f"\n**{(group.__doc__ or '').splitlines()[0].rstrip('.')}**\n", "| flag | default | meaning |"]
        lines += ["|---|---|---|"]
        for field in dataclasses.fields(group):
            fixed = group is ModelConfig or field.metadata.get("trajectory")
            meaning = described.get(field.name, "").replace("|", "\\|")
            default = " ".join(map(str, field.default)) or None if isinstance(field.default, tuple) else field.default
            lines.append(f"| `{flag(field.name)}`{' *' if fixed else ''} | `{default}` | {meaning} |")
    return "\n".join(lines).strip() + "\n"


def field_docstrings(group: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


if __name__ == "__main__":
    print(settings_table(), end="")
