"""Documents that are rows of tables: Parquet files, saved Hugging Face datasets, and datasets that `datasets` streams.

Of a table only the columns that are asked for are read, and of a batch one row at a time is turned into text, so that memory stays
bounded by a batch as it lies in the file (a saved dataset is mapped, and takes none).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.data.documents import Cursor, Fields
from shearling.data.files import DamagedFile, TextFile, check_size, open_seekable, unreadable
from shearling.data.remote import told
from shearling.errors import ArtifactError, DataError, Problem, ShearlingError
from shearling.io.files import read_json, safe_join

_BATCH = 256
"""Rows of a Parquet file that are decoded at once."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What ends a stream in Arrow's format, since 0.15."""


class _Row(Mapping[str, Any]):
    """One row of an Arrow table; a value is made when it is asked for."""

    def __init__(self, batch: Any, index: int, names: list[str]) -> None:
        self._batch, self._index, self._names = batch, index, names

    def __getitem__(self, name: str) -> Any:
        column = self._batch.schema.get_field_index(name)
        if column < 0:
            raise KeyError(name)
        return self._batch.column(column)[self._index].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rows(batch: Any, first: int, passed: int, cursor: Cursor, names: list[str]) -> Iterator[tuple[_Row, int]]:
    """The rows of a batch from `passed` on; `first` is the number of the batch's first row."""
    for index in range(passed, batch.num_rows):
        cursor.records += 1
        yield _Row(batch, index, names), first + index


@dataclass(frozen=True)
class _TableFile:
    """A file whose records are rows; see `documents.Part`."""

    file: TextFile

    def place(self, number: int) -> str:
        """See `documents.Part`."""
        return f"{self.file.shown}: row {number}"

    def row(self, raw: _Row, number: int) -> Mapping[str, Any] | None:
        """See `documents.Part`."""
        return raw


@dataclass(frozen=True)
class ParquetPart(_TableFile):
    """A Parquet file, local or behind a URL; see `documents.Part`."""

    fields: Fields

    def raw(self, cursor: Cursor) -> Iterator[tuple[_Row, int]]:
        """The rows. Of `cursor.bytes_read` the file takes the part of its size that is the part of its rows."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        number, before = 1, cursor.bytes_read
        with closing(open_seekable(self.file)) as opened:
            try:
                # With a buffer a column of a row group, which may be gigabytes, is read piece by piece.
                table = pq.ParquetFile(opened, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
                total, names = table.metadata.num_rows, table.schema_arrow.names
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if cursor.skip >= rows:
                        cursor.pass_over(rows)
                        number += rows
                        continue
                    for batch in table.iter_batches(_BATCH, row_groups=[group], columns=self.fields.names):
                        yield from _rows(batch, number, cursor.pass_over(batch.num_rows), cursor, names)
                        number += batch.num_rows
                        cursor.bytes_read = before + (self.file.size or 0) * (number - 1) // max(1, total)
            except ShearlingError:
                raise
            except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:
                headline = f"{self.file.shown}: cannot be read{_after(number)}"
                problem = Problem("file", told(error, self.file.path), "The file is damaged or no parquet file; get it again.")
                raise DamagedFile(headline, [problem]) from error
            except Exception as error:  # whatever the library of a file system raises
                raise unreadable(self.file, error) from error
        cursor.bytes_read = before + (self.file.size or 0)


@dataclass(frozen=True)
class ArrowPart(_TableFile):
    """A file of a dataset that `save_to_disk` wrote, in Arrow's stream format; see `documents.Part`."""

    def raw(self, cursor: Cursor) -> Iterator[tuple[_Row, int]]:
        """The rows, mapped into memory."""
        import pyarrow as pa

        number, before = 1, cursor.bytes_read
        try:
            with pa.memory_map(self.file.path) as mapped:
                check_size(self.file, mapped.size())
                # A reader takes a file that is cut off between two batches for one that has ended.
                if mapped.size() < len(_END) or mapped.read_at(len(_END), mapped.size() - len(_END)) != _END:
                    raise EOFError("the file does not end as one that was written whole")
                with pa.ipc.open_stream(mapped) as reader:
                    names = reader.schema.names
                    for batch in reader:
                        yield from _rows(batch, number, cursor.pass_over(batch.num_rows), cursor, names)
                        number += batch.num_rows
                        cursor.bytes_read = before + mapped.tell()
        except ShearlingError:
            raise
        except (pa.ArrowException, EOFError, OSError, ValueError) as error:
            headline = f"{self.file.shown}: cannot be read{_after(number)}"
            raise DamagedFile(headline, [Problem("file", told(error), "The file is damaged; save the dataset again.")]) from error
        cursor.bytes_read = before + (self.file.size or 0)


@dataclass(frozen=True)
class StreamPart:
    """A split of a dataset that `datasets.load_dataset` streams: on the Hugging Face hub, or a local folder; see `documents.Part`."""

    dataset: str
    subset: str | None
    split: str
    revision: str | None

    @property
    def shown(self) -> str:
        """What is read, in words."""
        return f"{self.dataset}{f' ({self.subset})' if self.subset else ''}, split {self.split}"

    def raw(self, cursor: Cursor) -> Iterator[tuple[Mapping[str, Any], int]]:
        """The rows."""
        # What the library passes over it counts itself, and says nothing where there are fewer rows.
        number = cursor.pass_over(cursor.skip)
        try:
            import datasets

            opened = datasets.load_dataset(self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True)
            rows: Iterable[Mapping[str, Any]] = opened.skip(number) if number else opened
            for row in rows:
                number += 1
                cursor.records += 1
                yield row, number
        except Exception as error:  # the library raises whatever its file systems and decoders raise; all of it means the same here
            remedy = "Check the dataset's name, subset, split and revision, the network, and that you are logged in if it is gated."
            raise DataError(f"{self.shown}: cannot be read{_after(number + 1)}", [Problem("text", told(error), remedy)]) from error

    def place(self, number: int) -> str:
        """See `documents.Part`."""
        return f"{self.shown}: row {number}"

    def row(self, raw: Mapping[str, Any], number: int) -> Mapping[str, Any] | None:
        """See `documents.Part`."""
        return raw


def saved_dataset(folder: Path, split: str) -> list[TextFile] | None:
    """The Arrow files of a dataset that `save_to_disk` wrote, in order; None where the folder holds no such dataset.

    Args:
        folder: of a `Dataset`, which has one split and does not always know its name ("train" is any), or of a `DatasetDict`.
        split: the split to read.

    Raises:
        DataError: it has no such split, is damaged, or was saved in a way that cannot be read in order.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            known = read_json(folder / "dataset_dict.json")
            splits = known.get("splits") if isinstance(known, dict) else None
            names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
            if split not in names:
                found = f"no split {split!r}, but {', '.join(map(repr, names[:20])) or 'none'}"
                raise DataError(f"{folder}: has no such split", [Problem("split", found, "Name one of the dataset's splits.")])
            folder, split = safe_join(folder, split), "train"
        if not (folder / "state.json").is_file():
            return None
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or state.get("_indices_data_files"):
            found = "rows in another order than they are stored" if isinstance(state, dict) else "no mapping"
            raise DataError(f"{folder}: cannot be read", [Problem("state.json", found, "Save the dataset again, with a newer `datasets`.")])
        if split not in ("train", state.get("_split")):
            found = f"no split {split!r}: the folder is that of one split, {state.get('_split')!r}"
            raise DataError(f"{folder}: has no such split", [Problem("split", found, "Leave split out.")])
        names = [entry["filename"] for entry in state["_data_files"]]
        paths = [safe_join(folder, name) for name in names]
        return [TextFile(str(path), path.stat().st_size) for path in paths]
    except ArtifactError as error:
        raise DataError(error.headline, error.problems) from None
    except (KeyError, TypeError) as error:
        remedy = "The file is damaged; save the dataset again."
        raise DataError(f"{folder}: cannot be read", [Problem("state.json", told(error), remedy)]) from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be read", [Problem("file", str(error), "The dataset is not whole; save it again.")]) from None


def _after(number: int) -> str:
    return f" after row {number - 1}" if number > 1 else ""
