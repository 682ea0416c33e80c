"""Small corpora in every format, a source that fails, and a Hugging Face Hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from train.data.hub import HubSource
from train.data.sources import Row, Source, Stream
from train.data.tokenizer import train_tokenizer

WORDS = "the cat model reads a long small page of text and then writes naïve words 漢字 again until night falls".split()


def make_texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Different texts of 1 to `longest` words."""
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for number in range(count)]


def split_evenly(items: list, parts: int) -> list[list]:
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def write_parquet(
    folder: Path, texts: list, shards: int = 3, rows_per_group: int = 4, kind: pyarrow.DataType = None
) -> Path:
    """Several files with tiny row groups. Texts are strings, None, or bytes (taken as they are, UTF-8 or not)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(split_evenly(texts, shards)):
        content = [text.encode() if isinstance(text, str) else text for text in part]
        column = pyarrow.array(content, pyarrow.binary()).view(pyarrow.string())
        table = pyarrow.table({"text": column if kind is None else column.cast(kind), "id": list(range(len(part)))})
        pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=rows_per_group)
    return folder


def write_json_lines(folder: Path, texts: list[str], shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(split_evenly(texts, shards)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (folder / f"part-{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_text_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int = 320) -> Path:
    train_tokenizer(texts, vocab_size).save(folder)
    return folder


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has one: pieces begin with their space, what has none is bytes, and a sentence starts with `<s>`."""
    special, pieces = ["<unk>", "<s>", "</s>"], ["▁a", "▁t", "he", "▁the"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abehté", *pieces]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


class FailingSource:
    """A source whose streams break with an `OSError` after `rows` rows, `failures` times in all. With `lasting`,
    none gives a row after the first time."""

    def __init__(self, source: Source, rows: int, failures: int, lasting: bool = False):
        self.source, self.rows_given, self.failures, self.lasting = source, rows, failures, lasting
        self.identity, self.option = source.identity, source.option
        self.opened = 0

    def rows(self, state: dict | None) -> Stream:
        self.opened += 1
        return _FailingStream(self, self.source.rows(state))


class _FailingStream:
    def __init__(self, owner: FailingSource, stream: Stream):
        self._owner, self._stream, self._left = owner, stream, owner.rows_given
        self.state, self.close = stream.state, stream.close

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self._left == 0 and self._owner.failures > 0:
            self._owner.failures -= 1
            self._owner.rows_given *= not self._owner.lasting
            raise OSError("connection lost")
        self._left -= 1
        return next(self._stream)


class LocalHub:
    """The few requests of the Hub's protocol that `datasets` and `huggingface_hub` make to stream one dataset,
    `owner/data`, with its files under one revision. Point HF_ENDPOINT at `endpoint`."""

    REVISION = "5" * 40

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.refused_after: int | None = None
        """Reads of data files answered before the others are refused; None: all are answered."""
        self.faults: dict[int, str] = {}
        """By the number of a read of data files, what happens to it: `429`, `500`, `drops` or `stalls` in the
        midst of it, or `truncates` it."""
        self.newest = self.REVISION
        self.reads = 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
                status, content, headers = hub.answer(self.path, self.headers.get("range"), body)
                fault = headers.pop("fault", "")
                if fault == "truncates":
                    content = content[: len(content) // 2]
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2])
                    if fault == "stalls":
                        time.sleep(5)  # more than HF_HUB_DOWNLOAD_TIMEOUT
                    if fault in ("stalls", "drops"):
                        self.close_connection = True
                        return
                    self.wfile.write(content[len(content) // 2 :])

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, span: str | None, body: str) -> tuple[int, bytes, dict[str, str]]:
        parts = urllib.parse.unquote(urllib.parse.urlparse(path).path).strip("/").split("/")
        match parts:
            case ["api", "datasets", "owner", "data"] | ["api", "datasets", "owner", "data", "revision", self.REVISION]:
                revision = self.REVISION if "revision" in parts else self.newest
                info = {"id": "owner/data", "sha": revision, "private": False, "gated": False, "siblings": []}
                return self.json(info)
            case ["api", "datasets", "owner", "data", "tree", self.REVISION, *folder]:
                inside = [name for name in self.files if name.split("/")[:-1] == folder]
                below = {name.split("/")[0] for name in self.files if "/" in name} if not folder else set()
                return self.json([self.entry(name) for name in [*sorted(below), *sorted(inside)]])
            case ["api", "datasets", "owner", "data", "paths-info", self.REVISION]:
                paths = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
                return self.json([self.entry(name) for name in paths])
            case ["datasets", "owner", "data", "resolve", self.REVISION, *name] if "/".join(name) in self.files:
                return self.content("/".join(name), span)
        kind = "EntryNotFound" if "resolve" in parts else "RepoNotFound"
        return 404, b"", {"x-error-code": kind}

    @staticmethod
    def json(value: object) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"content-type": "application/json"}

    def entry(self, name: str) -> dict:
        oid = hashlib.sha1(name.encode()).hexdigest()
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": oid, "size": 0}
        return {"type": "file", "path": name, "oid": oid, "size": len(self.files[name])}

    def content(self, name: str, span: str | None) -> tuple[int, bytes, dict[str, str]]:
        content, headers = self.files[name], {"etag": f'"{name}"', "x-repo-commit": self.REVISION}
        if not span:
            return 200, content, headers
        self.reads += 1
        if self.refused_after is not None and self.reads > self.refused_after:
            return 403, b"", {}
        fault = self.faults.get(self.reads, "")
        if fault.isdigit():
            return int(fault), b"", {}
        headers |= {"fault": fault} if fault else {}
        start, end = (int(bound) for bound in span.removeprefix("bytes=").split("-"))
        part = content[start : end + 1]
        return 206, part, {**headers, "content-range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}


@contextmanager
def local_hub(files: dict[str, bytes]) -> Iterator[LocalHub]:
    hub = LocalHub(files)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def streamed(folder, text_field="text"):
    """Local parquet files as `datasets` streams them from the Hub."""
    import datasets

    files = sorted(str(file) for file in folder.glob("*.parquet"))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return HubSource(dataset, "owner/data", None, None, text_field)


def texts_of(rows):
    return [row.value.decode() if isinstance(row.value, bytes) else row.value for row in rows]


# ------------------------------------------------------------------------------------------------------ positions


def take(data, count, cursor=None):
    batches = data.batches(cursor)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def hashes(batches):
    return [hashlib.sha256(batch.inputs.tobytes() + batch.targets.tobytes()).hexdigest() for batch in batches]
