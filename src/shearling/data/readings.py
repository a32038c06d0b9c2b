"""Reading the documents of a split in order, from any record on, with a count of what was dropped."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Literal

from shearling.data.documents import BadDocument, Cursor, Fields, LinesPart, Part, WholePart
from shearling.data.files import PARQUET, WHOLE, TextFile
from shearling.data.tables import ParquetPart

PLACES = 3
"""Broken documents that are named."""


class Reading(Iterator[str]):
    """The texts of a split, as they stand, in order; used once. Blank texts are among them.

    Args:
        parts: what is read, one after another.
        fields: which fields matter.
        skip: raw records to pass over: they are read, but not parsed.
        bad_documents: stop: a broken document is an error. skip: it is counted, and left out.

    Raises:
        DamagedFile: (while it is read) a file is cut off, damaged or changed; texts of it that were given before may be wrong.
        BadDocument: with `stop`, a record is broken: a line that is no JSON object or not UTF-8, a field that is missing, a text that
            is none. File and line or row are named.
        DataError: a file cannot be read. (The other two are kinds of it.)
    """

    def __init__(self, parts: Iterable[Part], fields: Fields, skip: int = 0, bad_documents: Literal["stop", "skip"] = "stop") -> None:
        self.filtered = 0
        """Records without one of the values that `where` asks for, since `skip`."""
        self.skipped = 0
        """Broken records, since `skip`."""
        self.places: list[str] = []
        """The first broken records, `PLACES` at most, since `skip`: what is wrong with them, and where."""
        self.seen = fields.seen
        """Field of `where` -> some of the values that kept documents out."""
        self._cursor = Cursor(skip)
        self._stop = bad_documents == "stop"
        self._texts = self._read(parts, fields)

    @property
    def records(self) -> int:
        """Raw records passed: those of `skip`, blank, filtered and broken ones, and those whose text was given."""
        return self._cursor.records

    @property
    def bytes_read(self) -> int:
        """Bytes read so far of the files as they lie, compressed, those passed over among them; an estimate inside a Parquet file."""
        return self._cursor.bytes_read

    def counts(self) -> dict[str, int]:
        """What was dropped since `skip`, by the names that the manifest has for it."""
        return {"filtered_documents": self.filtered, "skipped_documents": self.skipped}

    def close(self) -> None:
        """Close the file that is open; nothing more is read."""
        self._texts.close()

    def __next__(self) -> str:
        return next(self._texts)

    def _read(self, parts: Iterable[Part], fields: Fields) -> Generator[str, None, None]:
        for part in parts:
            for raw, number in part.raw(self._cursor):
                try:
                    row = part.row(raw, number)
                    text = None if row is None else fields.text_of(row, part, number)
                except BadDocument as error:
                    if self._stop:
                        raise
                    self.skipped += 1
                    if len(self.places) < PLACES:
                        self.places.append(error.headline)
                    continue
                if text is not None:
                    yield text
                elif row is not None:
                    self.filtered += 1


def file_parts(files: Sequence[TextFile], fields: Fields) -> Iterator[Part]:
    """What reads each of some files, by its kind."""
    for file in files:
        if file.kind == PARQUET:
            yield ParquetPart(file, fields)
        elif file.kind in WHOLE:
            yield WholePart(file, fields.text)
        else:
            yield LinesPart(file)
