"""The documents of text files: which record is one, which is filtered, and what is wrong with it.

Everything streams: what is held in memory is one document and one block of a file, never a file. A record is a line of a file of JSON
lines, a whole file of text, or a row of a table (tables.py). What is wrong with one record is a `BadDocument`, which names the file and
the line or row, and may be skipped where the user asked for that; what makes a file unreadable is another `DataError`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shearling.data.files import TextFile, blocks
from shearling.errors import DataError, Problem

MOST_SEEN = 12
"""Values of a field that are remembered for a message."""
_ABSENT = object()


class BadDocument(DataError):
    """One record that is no document, in a file that can be read on."""


@dataclass
class Cursor:
    """How far reading is; what reads moves it."""

    skip: int = 0
    """Records still to be passed over."""
    records: int = 0
    """Records passed, those passed over among them."""
    bytes_read: int = 0
    """Bytes of the files as they lie, compressed."""

    def count(self, size: int) -> None:
        """Enter `size` bytes."""
        self.bytes_read += size

    def pass_over(self, most: int) -> int:
        """Pass over as many records as are still to be, `most` at most; return how many."""
        number = min(self.skip, most)
        self.skip -= number
        self.records += number
        return number


class Part(Protocol):
    """A file, or another thing with records in a settled order."""

    def raw(self, cursor: Cursor) -> Iterator[tuple[Any, int]]:
        """Records as they stand, with numbers from 1 on, after those that `cursor` says to pass over; each is entered in `cursor`.

        Raises:
            DataError: the file cannot be read on.
        """

    def place(self, number: int) -> str:
        """The record of that number, in words."""

    def row(self, raw: Any, number: int) -> Mapping[str, Any] | None:
        """The fields of a record; None for a blank line. Raises `BadDocument`."""


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value of a field; `a.b` is the field of that name, or else the field `b` of the mapping `a`. Raises KeyError."""
    if (value := row.get(path, _ABSENT)) is not _ABSENT:
        return value
    found: Any = row
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise KeyError(path)
        found = found[name]
    return found


@dataclass
class Fields:
    """Which fields of a record matter."""

    text: str
    """Field of the text; may be a dotted path."""
    where: Mapping[str, frozenset[tuple[bool, Any]]] = field(default_factory=dict)
    """Field -> `key` of each value that a document may have there."""
    seen: dict[str, dict[tuple[bool, Any], None]] = field(default_factory=dict)
    """Field -> keys of values that kept a document out, in the order in which they were met, `MOST_SEEN` at most."""

    @staticmethod
    def key(value: Any) -> tuple[bool, Any]:
        """What stands for a value in comparisons: true is not 1, and a list or a mapping equals nothing that can be asked for."""
        return isinstance(value, bool), value if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"

    @property
    def names(self) -> list[str]:
        """The fields that are read."""
        return [self.text, *self.where]

    def text_of(self, row: Mapping[str, Any], part: Part, number: int) -> str | None:
        """The text of a record, None where it is filtered out. Raises `BadDocument`, which names the place of record `number` of `part`.

        A lone half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
        """
        for name, kept in self.where.items():
            key = self.key(self._value(row, name, part, number, "where"))
            if key not in kept:
                seen = self.seen.setdefault(name, {})
                if len(seen) < MOST_SEEN:
                    seen[key] = None
                return None
        text = self._value(row, self.text, part, number, "text_field")
        if not isinstance(text, str):
            found = "null" if text is None else f"a {type(text).__name__}"
            raise BadDocument(
                f"{part.place(number)}: the field {self.text!r} is no text",
                [Problem("text_field", found, "Every document must be a string.")],
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    @staticmethod
    def _value(row: Mapping[str, Any], name: str, part: Part, number: int, asked_by: str) -> Any:
        try:
            return lookup(row, name)
        except KeyError:
            found = f"the fields {', '.join(map(repr, list(row)[:20]))}" if row else "no fields"
            what = "holds the text" if asked_by == "text_field" else "documents are chosen by"
            problem = Problem(asked_by, found, f"Name the field that {what}.")
            raise BadDocument(f"{part.place(number)} has no field {name!r}", [problem]) from None
        except UnicodeDecodeError as error:
            remedy = "Text must be UTF-8: mend the file, or remove the row."
            problem = Problem(asked_by, f"{error.reason} in {name!r}", remedy)
            raise BadDocument(f"{part.place(number)} is not UTF-8", [problem]) from None


@dataclass(frozen=True)
class LinesPart:
    """A file of one JSON object a line. Blank lines are records without a document."""

    file: TextFile

    def raw(self, cursor: Cursor) -> Iterator[tuple[bytes, int]]:
        """The lines; see `Part`."""
        for number, line in enumerate(_lines(blocks(self.file, cursor.count)), start=1):
            if not cursor.pass_over(1):
                cursor.records += 1
                yield line, number

    def place(self, number: int) -> str:
        """See `Part`."""
        return f"{self.file.shown}: line {number}"

    def row(self, raw: bytes, number: int) -> Mapping[str, Any] | None:
        """The JSON object of a line; see `Part`."""
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not line or line.isspace():
            return None
        text = _decode(line, self.file, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            remedy = "Each line must be one JSON object; mend or remove this line."
            raise BadDocument(f"{self.place(number)} is not JSON", [Problem("line", f"{_excerpt(line)} ({error})", remedy)]) from None
        if not isinstance(row, dict):
            found = f"a JSON {type(row).__name__}: {_excerpt(line)}"
            raise BadDocument(
                f"{self.place(number)} is not a JSON object", [Problem("line", found, 'Write each document as {"text": "..."}.')]
            )
        return row


@dataclass(frozen=True)
class WholePart:
    """A file that is one document."""

    file: TextFile
    text_field: str

    def raw(self, cursor: Cursor) -> Iterator[tuple[bytes, int]]:
        """The content; see `Part`."""
        if cursor.pass_over(1):
            cursor.count(self.file.size or 0)
        else:
            content = b"".join(blocks(self.file, cursor.count))
            cursor.records += 1
            yield content, 1

    def place(self, number: int) -> str:
        """See `Part`."""
        return self.file.shown

    def row(self, raw: bytes, number: int) -> Mapping[str, Any] | None:
        """The content, under the name that text is looked for under; see `Part`."""
        return {self.text_field: _decode(raw, self.file, None)}


def _lines(data: Iterable[bytes]) -> Iterator[bytes]:
    """Split at line feeds. The parts of a long line are joined once, so that one line of gigabytes costs no quadratic time."""
    parts: list[bytes] = []
    for block in data:
        head, *rest = block.split(b"\n")
        parts.append(head)
        for piece in rest:
            yield b"".join(parts) if len(parts) > 1 else parts[0]
            parts = [piece]
    if last := b"".join(parts):
        yield last


def _decode(data: bytes, file: TextFile, line: int | None) -> str:
    try:
        return data.decode("utf-8" if line else "utf-8-sig")
    except UnicodeDecodeError as error:
        number = line or data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in {_excerpt(data[max(0, error.start - 20) : error.start + 20])}"
        remedy = "Text must be UTF-8: convert the file, or remove the line."
        raise BadDocument(f"{file.shown}: line {number} is not UTF-8", [Problem("encoding", found, remedy)]) from None


def _excerpt(data: bytes) -> str:
    return repr(data[:60].decode("utf-8", "replace")) + ("..." if len(data) > 60 else "")
