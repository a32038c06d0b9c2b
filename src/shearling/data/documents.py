"""The documents of a domain, one string each, in an order that depends on the names of the files alone.

Everything streams: what is held in memory is one document and one block of a file, never a file. Broken input raises a
`DataError` that names the file and the line; nothing is skipped silently except blank lines and files of unknown kinds in a folder.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from shearling.errors import DataError, Problem

LINES = (".jsonl", ".json")
"""Kinds of file that hold one JSON object a line."""
WHOLE = (".txt", ".md", ".rst", ".py")
"""Kinds of file that are one document."""
COMPRESSED = (".gz", ".zst")
_KINDS = f"Known are {', '.join(LINES + WHOLE)}, these with {' or '.join(COMPRESSED)}, and .parquet."
_BLOCK = 2**16


def find_files(paths: Sequence[str], field: str) -> tuple[list[Path], list[Problem]]:
    """The text files that `paths` name, sorted, and what is wrong with the paths; `field` names them in a recipe.

    A path is a file, a folder (every file of a known kind below it, hidden ones left out) or a glob (`**` for any depth). An
    existing path is taken as it is, whatever characters it has.
    """
    found: set[Path] = set()
    problems = []
    for path in paths:
        matches = [Path(path)] if os.path.lexists(path) else _glob(Path(path))
        if not matches:
            problems.append(Problem(field, path, "No file matches; check the path, or the folder that relative paths start from."))
        for match in matches:
            files = sorted(_walk(match)) if match.is_dir() else [match]
            if not files:
                problems.append(Problem(field, f"{match}, a folder without text files", _KINDS))
            for file in files:
                if _kind(file) is None:
                    problems.append(Problem(field, str(file), f"This is no kind of text file that can be read. {_KINDS}"))
                elif not (file.is_file() and os.access(file, os.R_OK)):
                    problems.append(Problem(field, str(file), "The file cannot be read; check the link or its permissions."))
            found.update(files)
    return sorted(found), problems


def _glob(path: Path) -> list[Path]:
    """Matches of a pattern, sorted; leading parts that exist are taken as they are, so '[' in a folder's name does no harm."""
    folder, rest = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while rest and os.path.lexists(folder / rest[0]):
        folder /= rest.pop(0)
    return [folder / name for name in sorted(glob.glob(os.path.join(*rest), root_dir=folder, recursive=True))] if rest else []


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith(".") and _kind(Path(name)))


def _kind(path: Path) -> str | None:
    """The ending that tells how to read a file, without the compression; None if it is not known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in LINES + WHOLE else None
    return suffix if suffix in (*LINES, *WHOLE, ".parquet") else None


def read_files(files: Iterable[Path], text_field: str) -> Iterator[str]:
    """The documents of local files, one after another.

    A lone half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD.

    Raises:
        DataError: a file that cannot be read, is cut off or not UTF-8, a line that is no JSON object, or has no such text field.
    """
    for path in files:
        kind = _kind(path)
        if kind == ".parquet":
            yield from _read_parquet(path, text_field)
        elif kind in WHOLE:
            yield _decode(b"".join(_blocks(path)), path, None)
        else:
            yield from _read_lines(path, text_field)


def read_hub(dataset: str, subset: str | None, split: str, revision: str | None, text_field: str) -> Iterator[str]:
    """The documents of a split of a dataset on the Hugging Face hub, streamed.

    Raises:
        DataError: the dataset cannot be opened or read on, or has no such text field.
    """
    where = f"{dataset}{f' ({subset})' if subset else ''}, split {split}"

    def rows() -> Iterable[dict[str, Any]]:
        import datasets

        opened: Iterable[dict[str, Any]] = datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)
        return opened

    remedy = "Check the dataset's name, subset, split and revision, the network, and that you are logged in if it is gated."
    yield from _read_rows(rows, where, text_field, remedy)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    def rows() -> Iterable[dict[str, Any]]:
        import datasets

        opened: Iterable[dict[str, Any]] = datasets.load_dataset(
            "parquet", data_files={"train": [glob.escape(str(path))]}, split="train", streaming=True
        )
        return opened

    yield from _read_rows(rows, str(path), text_field, "The file is damaged or no parquet file; get it again.")


def _read_rows(open_rows: Callable[[], Iterable[dict[str, Any]]], where: str, text_field: str, remedy: str) -> Iterator[str]:
    number = 0
    try:
        for number, row in enumerate(open_rows(), start=1):
            yield _text(row, text_field, f"{where}: row {number}")
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its file systems and decoders raise; all of it means the same here
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{where}: cannot be read{f' after row {number}' if number else ''}", [Problem("text", found, remedy)]) from error


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_blocks(path)), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        text = _decode(line, path, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            remedy = "Each line must be one JSON object; mend or remove this line."
            raise DataError(f"{where} is not JSON", [Problem("line", f"{_excerpt(line)} ({error})", remedy)]) from None
        if not isinstance(row, dict):
            found = f"a JSON {type(row).__name__}: {_excerpt(line)}"
            raise DataError(f"{where} is not a JSON object", [Problem("line", found, f'Write each document as {{"{text_field}": "..."}}.')])
        yield _text(row, text_field, where)


def _text(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        found = f"the fields {', '.join(map(repr, list(row)[:20]))}" if row else "no fields"
        raise DataError(f"{where} has no field {text_field!r}", [Problem("text_field", found, "Name the field that holds the text.")])
    text = row[text_field]
    if not isinstance(text, str):
        found = "null" if text is None else f"a {type(text).__name__}"
        raise DataError(f"{where}: the field {text_field!r} is no text", [Problem("text_field", found, "Every document must be a string.")])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at line feeds. The parts of a long line are joined once, so that one line of gigabytes costs no quadratic time."""
    parts: list[bytes] = []
    for block in blocks:
        head, *rest = block.split(b"\n")
        parts.append(head)
        for piece in rest:
            yield b"".join(parts)
            parts = [piece]
    yield b"".join(parts)


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, a block at a time."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstd_blocks(path)
        elif suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from iter(lambda: file.read(_BLOCK), b"")
        else:
            with open(path, "rb") as plain:
                yield from iter(lambda: plain.read(_BLOCK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        remedy = "The file is cut off or damaged; get it again."
        raise DataError(f"{path}: cannot be decompressed", [Problem("file", str(error), remedy)]) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read", [Problem("file", str(error), "Check the file and its disk.")]) from None


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    # Frame by frame by hand: the library's stream reader takes a file that is cut off for one that has ended.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, begun = decompressor.decompressobj(), False
    with open(path, "rb") as file:
        while data := file.read(_BLOCK // 4):
            while data:
                yield frame.decompress(data)
                begun, data = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = decompressor.decompressobj()
    if begun:
        raise EOFError("the file ends inside a compressed frame")


def _decode(data: bytes, path: Path, line: int | None) -> str:
    try:
        return data.decode("utf-8" if line else "utf-8-sig")
    except UnicodeDecodeError as error:
        number = line or data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in {_excerpt(data[max(0, error.start - 20) : error.start + 20])}"
        remedy = "Text must be UTF-8: convert the file, or remove the line."
        raise DataError(f"{path}: line {number} is not UTF-8", [Problem("encoding", found, remedy)]) from None


def _excerpt(data: bytes) -> str:
    return repr(data[:60].decode("utf-8", "replace")) + ("..." if len(data) > 60 else "")
