"""What one setting of a run may be, beside a name, a default and a line of help."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""A flag that is given once for each value; in TOML one text or a list of them."""


def trajectory(default: Any) -> Any:
    """A setting that a resumed run must share with its checkpoint."""
    return dataclasses.field(default=default, metadata={"trajectory": True})
