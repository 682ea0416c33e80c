"""Each option of each command is explained by a line that can be read by itself."""

import argparse
import dataclasses
import importlib
import re

import pytest
import tyro

from train.command_line import field_docstrings

COMMANDS = {
    "train.flax_main": ("flax", "jax"),
    "torch_ref.train": ("torch",),
    "train.generate": (),
    "train.evaluate": (),
    "train.convert": (),
    "train.plot": (),
    "train.runs": (),
    "train.bench.__main__": (),
    "train.plan.__main__": (),
    "train.bench.gpu_check": (),
    "train.warm_start.__main__": ("torch",),
    "parity_tests.report": ("flax", "torch"),
    "parity_tests.check": ("flax", "torch"),
    "parity_tests.harness.kills": (),
    "parity_tests.harness.write_faults": (),
}


class Shown(Exception):
    """What `--help` would show: lines of help by option."""


def of_dataclass(options: type) -> dict[str, str]:
    """Lines of help of a dataclass and of the dataclasses in it, as tyro shows them."""
    lines = {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.type):
            lines |= of_dataclass(field.type)
        else:
            owner = next(base for base in options.__mro__ if field.name in base.__dict__.get("__annotations__", {}))
            lines[field.name] = field_docstrings(owner).get(field.name, "")
    return lines


def shown_by(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    def by_argparse(self, parser, *_):
        actions = [action for action in parser._actions if action is not self]
        raise Shown({action.dest: (action.help or "") % {"default": action.default} for action in actions})

    def by_tyro(options, **_):
        raise Shown(of_dataclass(options))

    monkeypatch.setattr(argparse._HelpAction, "__call__", by_argparse)
    monkeypatch.setattr(tyro, "cli", by_tyro)
    with pytest.raises(Shown) as shown:
        importlib.import_module(command).main(["--help"])
    return shown.value.args[0]


def why_not_a_sentence(line: str) -> str | None:
    """A rule that a machine can hold a line of help to, or None if it holds."""
    if not line[:1].isupper():
        return "begins without a capital"
    if not line.endswith("."):
        return "ends without a period"
    if len(line.split()) < 4:
        return "is too short to say what is meant"
    if re.match(r"(Of|Its|Their|On|By)\b", line):
        return "leans on a word that is not there"
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_by_itself(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in COMMANDS[command]:
        pytest.importorskip(package)
    lines = shown_by(command, monkeypatch)
    assert lines
    assert {name: f"{line!r} {why}" for name, line in lines.items() if (why := why_not_a_sentence(line))} == {}


@pytest.mark.parametrize(
    "line", ["", "Of samples.", "Peak.", "a new folder to write", "Its project at Weights & Biases."]
)
def test_the_rule_refuses_what_cannot_stand_alone(line: str) -> None:
    assert why_not_a_sentence(line)
