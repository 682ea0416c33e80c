"""The text field of a row, also within nested fields, and which columns can hold one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch_ref.spec.interface import UserError


class Bad(NamedTuple):
    """Stands in for the text of a row that has none."""

    reason: str


def pick(record: Any, field: str) -> Any:
    """What a record holds at `field`. Where no key has that whole name, `a.b` is the field `b` within `a`; within a
    list it is the list of what each member holds."""
    if isinstance(record, list):
        return [pick(member, field) for member in record]
    if not isinstance(record, Mapping):
        return Bad(f"the field {field!r} is missing")
    if field in record:
        return record[field]
    head, dot, below = field.partition(".")
    return pick(record[head], below) if dot and head in record else Bad(f"the field {field!r} is missing")


def text_column(schema: Any, text_field: str, what: Path | str) -> tuple[str, str]:
    """The column of an Arrow schema that holds the text field, and the field's name within it (empty: itself). Raises
    `UserError` if it is missing or holds neither text, lists of texts nor chats."""
    top, below = text_field, ""
    if text_field not in schema.names:
        top, _, below = text_field.partition(".")
        if not below or top not in schema.names:
            raise UserError(f"--text-field {text_field}: {what} has no such column, only {', '.join(schema.names)}")
    kind = schema.field(top).type
    if not _is_text(kind, below):
        raise UserError(f"--text-field {text_field}: that column of {what} holds {kind}, not text")
    return top, below


def _is_text(kind: Any, below: str) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type, below)
    if any(is_list(kind) for is_list in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        inner = kind.value_type
        fields = {inner.field(number).name for number in range(inner.num_fields)} if types.is_struct(inner) else set()
        return _is_text(inner, below) or (not below and (fields >= {"role", "content"} or fields >= {"from", "value"}))
    if types.is_struct(kind) and below:
        names = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        if below in names:
            return _is_text(names[below], "")
        head, _, rest = below.partition(".")
        return bool(rest) and head in names and _is_text(names[head], rest)
    return not below and any(
        is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view)
    )
