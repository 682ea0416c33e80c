"""Let a trained model continue a text:

    python -m train.generate runs/tiny-flax --prompt "The str class"
    python -m train.generate exported --prompt "Gravity is" --greedy --max-new-tokens 50
    echo "Gravity is" | python -m train.generate runs/tiny-torch > text
    python -m train.generate runs/tiny-torch                             asks for one prompt after another

MODEL is a run folder of either framework, a checkpoint, a `transformers` folder or a file of final weights. Standard
output gets the continuation and nothing else, on a terminal as it comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import tyro

from torch_ref.spec.interface import Sampling, UserError
from train.shell import COMPLETE, parse_flags, shell, unicode_text
from train.state.trained import ModelOptions, TrainedModel


@dataclass(frozen=True)
class GenerateOptions(ModelOptions):
    """Let a trained model continue a text."""

    prompt: str | None = None
    """The text to continue; empty: the start of a document. None: standard input, on a terminal one prompt a line."""
    max_new_tokens: int = Sampling.max_new_tokens
    """The text ends after so many tokens, or where the model ends it."""
    greedy: bool = Sampling.greedy
    """Always take the most likely token."""
    temperature: float = Sampling.temperature
    """Below 1 likely tokens get likelier, above 1 less so."""
    top_k: int = Sampling.top_k
    """Draw from the k most likely tokens; 0 draws from all."""
    top_p: float = Sampling.top_p
    """Draw from the most likely tokens that together have this probability."""
    min_p: float = Sampling.min_p
    """Leave out tokens with less than this share of the most likely one's probability."""
    repetition_penalty: float = Sampling.repetition_penalty
    """Above 1, tokens that have occurred get less likely."""
    seed: int = 0
    """The same seed gives the same text."""

    def sampling(self, stop_token: int) -> Sampling:
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            greedy=self.greedy,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_token=stop_token,
        )


class TextStream:
    """Writes text as its tokens come. Only what may be the beginning of a character is held back."""

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str], object], before: Sequence[int] = ()
    ) -> None:
        """`before` are the tokens that the text goes on from."""
        self._decode, self._write = decode, write
        self._before = list(before)
        """The last tokens whose text is out, and whole: some decoders treat the first token of a text differently, and
        some know no byte of a sequence that is cut in a character."""
        self._ids: list[int] = []
        """Those since."""
        self._text = decode(self._before)
        """Of both."""
        self._written = len(self._text)
        """Characters of it that are out."""

    def add(self, token: int) -> None:
        text = self._decode([*self._before, *self._ids, token])
        if text and text == self._text and not self._decode([token]):
            return  # a special token: no part of a character
        self._ids.append(token)
        self._text = text
        # Bytes that are no UTF-8, or not yet, decode to U+FFFD, to one together or to one each.
        whole = text.rstrip("\ufffd")
        self._write_to(len(whole))
        if text == whole:
            self._go_on_from(self._ids if self._decode(self._ids) else [*self._before, *self._ids], [])
        elif len(self._ids) > 3:
            # No character has so many bytes: the first token began none. The last U+FFFD may still become one.
            self._write_to(len(text) - 1)
            self._go_on_from([], self._ids[1:], held=1)

    def _write_to(self, end: int) -> None:
        if end > self._written:
            self._write(self._text[self._written : end])
            self._written = end

    def _go_on_from(self, before: list[int], ids: list[int], held: int = 0) -> None:
        self._before, self._ids = before, ids
        self._text = self._decode([*before, *ids])
        self._written = len(self._text) - held

    def close(self) -> None:
        """Write what is left of an incomplete character."""
        self._write_to(len(self._text))


def continue_text(model: TrainedModel, prompt: str, options: GenerateOptions, stream: bool) -> str:
    """The model's continuation of a prompt; with `stream` it is also written to standard output as it comes."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    sampling = options.sampling(tokenizer.eot_id)
    if not stream:
        return tokenizer.decode_after(ids, model.generate([ids], sampling, options.seed)[0])

    def write(text: str) -> None:
        print(text, end="", flush=True)

    text = TextStream(tokenizer.decode, write, ids)

    def on_token(tokens: list[int | None]) -> None:
        if tokens[0] is not None:
            text.add(tokens[0])

    new = model.generate([ids], sampling, options.seed, on_token)[0]
    text.close()
    print()
    return tokenizer.decode_after(ids, new)


def ask(terminal: bool) -> Iterator[str]:
    """Prompts from standard input: all of it is one, on a terminal every line is."""
    if not terminal:
        yield _read(sys.stdin.read).removesuffix("\n")
        return
    print("A prompt a line; an empty line ends.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = _read(sys.stdin.readline).rstrip("\n")
        if not line:
            return
        yield line


def _read(read: Callable[[], str]) -> str:
    """Text from standard input. Raises `UserError` if it is none in the encoding of the terminal, or of the locale."""
    try:
        return unicode_text(read(), "standard input")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not {error.encoding.upper()} text, at byte {error.start + 1}") from None


@shell
def main(argv: Sequence[str]) -> int:
    stream = sys.stdout.isatty()
    options = parse_flags(GenerateOptions, "python -m train.generate", argv, config=(tyro.conf.FlagCreatePairsOff,))
    model = options.open()
    print(f"{options.model}, {model.framework} on {model.device}", file=sys.stderr)
    asks = options.prompt is None and sys.stdin.isatty()
    prompts = ask(asks) if options.prompt is None else [options.prompt]
    for prompt in prompts:
        try:
            text = continue_text(model, prompt, options, stream)
        except UserError as error:
            if not asks:
                raise
            print(f"error: {error}", file=sys.stderr)  # of this prompt: the next one may do
            continue
        if not stream:
            print(text)
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
