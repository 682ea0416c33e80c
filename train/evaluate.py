"""Score texts with a trained model:

    python -m train.evaluate runs/tiny-flax --data texts/*.txt

MODEL is a run folder of either framework, a checkpoint, a `transformers` folder or a file of final weights. Every
document is scored within its own boundaries: its first token is predicted from the end-of-text token before it, and
the end-of-text token after it counts as its last. Documents longer than the context are cut into rows of it, and each
token is predicted once. Bits per byte divide by the documents' UTF-8 bytes, so they compare across tokenizers.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from torch_ref.spec.interface import IGNORE, UserError
from train.data.corpus import Reader
from train.data.packing import Rows, document_rows
from train.data.sources import FileSource
from train.state.trained import DTypeName, Framework, TrainedModel, open_trained, parse_flags

TOKENS_PER_PASS = 4096
"""Positions of one forward pass, or one row if that is longer."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score texts with a trained model."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, a checkpoint, a transformers folder or a file of final weights."""
    data: tuple[str, ...]
    """Files (text, jsonl, parquet), folders or globs."""
    text_field: str = "text"
    """Of jsonl and parquet rows."""
    seq_len: int | None = None
    """Longest row; None: the model's context."""
    framework: Framework = "auto"
    """auto: the one that wrote the model."""
    step: int | None = None
    """Which checkpoint of a run folder; None: the latest."""
    tokenizer: str | None = None
    """A folder or a name on the Hub; None: the one beside the model."""
    dtype: DTypeName = "auto"
    """auto: bfloat16 on GPUs that have it, else float32."""
    device: str = "auto"
    """cuda, mps or cpu."""


@dataclass(frozen=True)
class Score:
    """What a model makes of some texts."""

    documents: int
    tokens: int
    """Scored: all of the documents, and one end of text each."""
    bytes: int
    """Of the documents, in UTF-8."""
    loss_sum: float
    """Nats."""

    @property
    def loss(self) -> float:
        """Mean next-token loss in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (
            f"Loss: {self.loss:.6f} | Perplexity: {self.perplexity:.4f} | Bits per byte: {self.bits_per_byte:.6f} "
            f"({self.documents} documents, {self.tokens} tokens, {self.bytes} bytes)"
        )


def evaluate(model: TrainedModel, texts: Iterable[str], seq_len: int) -> Score:
    """Score texts, each within its own boundaries, in rows of at most `seq_len` tokens.

    Raises `UserError` where there is no text.
    """
    documents = tokens = size = 0

    def rows() -> Iterator[Rows]:
        nonlocal documents, tokens, size
        for text in texts:
            document = document_rows(model.tokenizer.encode(text), seq_len, model.tokenizer.eot_id)
            documents, size = documents + 1, size + len(text.encode())
            tokens += int((document.targets != IGNORE).sum())
            yield document

    loss_sum = math.fsum(model.loss_sum(*batch) for batch in batches(rows(), seq_len))
    if not documents:
        raise UserError("--data: no text in there")
    return Score(documents, tokens, size, loss_sum)


def batches(documents: Iterable[Rows], seq_len: int) -> Iterator[Rows]:
    """Rows of like length together, cut to that length, in few shapes; the last ones are filled up with rows that are
    not scored."""
    waiting: dict[int, list] = defaultdict(list)
    for document in documents:
        for inputs, targets in zip(*document, strict=True):
            length = padded_length(int((targets != IGNORE).sum()), seq_len)
            waiting[length].append((inputs[:length], targets[:length]))
            if len(waiting[length]) == rows_per_pass(length):
                yield Rows(*map(np.stack, zip(*waiting.pop(length), strict=True)))
    for length, rows in waiting.items():
        missing = rows_per_pass(length) - len(rows)
        rows += [(np.zeros(length, np.int32), np.full(length, IGNORE, np.int32))] * missing
        yield Rows(*map(np.stack, zip(*rows, strict=True)))


def padded_length(length: int, longest: int) -> int:
    """64, 128, 256 and so on, at most `longest`."""
    return min(max(64, 1 << (length - 1).bit_length()), longest)


def rows_per_pass(length: int) -> int:
    return max(1, TOKENS_PER_PASS // length)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse_flags(EvaluateOptions, "python -m train.evaluate", argv)
        sources = [FileSource(pattern, options.text_field) for pattern in options.data]
        model = open_trained(
            options.model, options.framework, options.step, options.tokenizer, options.dtype, options.device
        )
        seq_len = options.seq_len or model.config.max_position
        if not 1 <= seq_len <= model.config.max_position:
            raise UserError(
                f"--seq-len {seq_len}: must be from 1 to the model's context of {model.config.max_position}"
            )
        print(f"{options.model}, {model.framework} on {model.device}", file=sys.stderr)
        texts = (document.text for source in sources for document in Reader(source))
        print(evaluate(model, texts, seq_len))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
