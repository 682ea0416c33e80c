"""The text of a row: text, texts joined, or a chat, written by a tokenizer's chat template or under roles' names."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import first_line
from train.data.records import Bad

BETWEEN_TEXTS = "\n\n"
"""Joins the texts of a list, and the messages of a chat without a template."""

_ASKS_FOR_NONE = re.compile(r"""\bcontent\W* is (not )?none""")
"""In a template: that it tells a message without content from an empty one, as DeepSeek's does for calls of tools."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that chats of `from` and `value` give to the roles."""


def as_chat(messages: list[dict]) -> list[dict[str, Any]] | Bad:
    """Messages with `role` and `content`, out of those or of `from` and `value`; contents in parts are joined. One
    without content has an empty text, or None if it calls tools. Whatever else is null is left out, as `transformers`
    does: rows of a table have each field that any of them has, and templates ask whether there is one."""
    chat = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not all(isinstance(part, str) for part in parts):
                return Bad("a message holds more than text")
            content = "".join(parts)
        if content is None and not fields.get("tool_calls"):
            content = ""
        if not isinstance(role, str) or not isinstance(content, str | None):
            return Bad("not a chat: a message without role and content")
        chat.append({**fields, "role": _ROLES.get(role, role), "content": content})
    return chat


def _texts_in(value: Any) -> Iterator[str]:
    """All that a template may write of a message: its role and its content, but also names, calls of tools and the
    like."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts_in(pair)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _texts_in(member)


@dataclass(frozen=True)
class ChatFormat:
    """How a chat is written. The same chat gives the same text at any time: templates are not told the date."""

    template: str | None = None
    """In Jinja, of a tokenizer. None: `User: ...`, `Assistant: ...`, with blank lines between."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token` and others by these names, for the template."""
    special: frozenset[str] = frozenset()
    """Special tokens, which in a text by the template mean themselves: a message that spells one is refused."""
    name: str = ""
    """Of the tokenizer, for messages."""

    def write(self, chat: list[dict[str, Any]]) -> str | Bad:
        if self.template is None or not _ASKS_FOR_NONE.search(self.template):
            chat = [{**message, "content": message["content"] or ""} for message in chat]
        if self.template is None:
            return BETWEEN_TEXTS.join(f"{message['role'].capitalize()}: {message['content']}" for message in chat)
        for message in chat:
            spelled = next((token for text in _texts_in(message) for token in self.special if token in text), None)
            if spelled:
                return Bad(f"a message spells the special token {spelled}")
        from jinja2 import TemplateError

        try:
            given = {"tools": None, "documents": None, "add_generation_prompt": False}  # as `transformers` does
            return self._compiled.render(messages=chat, **given, **self.tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            return Bad(f"the chat template refuses it: {first_line(error)}")

    @property
    def identity(self) -> str:
        """What makes the texts what they are."""
        if self.template is None:
            return "joined by role"
        made_of = json.dumps([self.template, dict(self.tokens), sorted(self.special)])
        return f"template {hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()}"

    @property
    def in_words(self) -> str:
        if self.template is None:
            return "each message under the name of its role, as the tokenizer has no chat template"
        return f"written by the chat template of {self.name}"

    @functools.cached_property
    def _compiled(self) -> Any:
        """In a sandbox: a template comes with a tokenizer, from anywhere."""
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what an assistant says; here it changes nothing."""

            tags = {"generation"}

            def parse(self, parser: Any) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
            written = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
            return json.dumps(value, ensure_ascii=ensure_ascii, **written)

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.template)
        except TemplateError as error:
            raise UserError(f"--tokenizer {self.name}: its chat template can't be read: {error}") from error


class TextRules(NamedTuple):
    """What is read as text."""

    chat: ChatFormat | None = ChatFormat()
    """How chats are written; None: they are bad rows."""
    lists: bool = True
    """Lists of texts, and fields within fields. Runs begun before these were read go on without them."""


PLAIN = TextRules()
"""Without a tokenizer's template."""
FORMER = TextRules(None, False)
"""Of runs begun before there were others."""


def text_of(value: Any, rules: TextRules) -> tuple[str | bytes, bool] | Bad:
    """The text, and whether it is a chat's."""
    if isinstance(value, Bad | str | bytes):
        return value if isinstance(value, Bad) else (value, False)
    if isinstance(value, list) and rules.lists and value:
        if bad := next((member for member in value if isinstance(member, Bad)), None):
            return bad
        if all(isinstance(member, str) for member in value):
            return BETWEEN_TEXTS.join(value), False
        if all(isinstance(member, dict) for member in value):
            if rules.chat is None:
                return Bad("a chat among texts")
            chat = as_chat(value)
            text = chat if isinstance(chat, Bad) else rules.chat.write(chat)
            return text if isinstance(text, Bad) else (text, True)
    return Bad(f"{type(value).__name__}, not text")
