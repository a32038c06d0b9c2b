"""Tensors in files: a strict safetensors header reader, a reader of model directories, and a writer, one shard at a time.

A safetensors file is 8 bytes (the header's length N, little-endian), N bytes of JSON (name -> dtype, shape, data_offsets), then
the data. Everything here is checked from headers before any tensor is opened; torch is imported only where one is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from shearling.errors import ArtifactError, Problem
from shearling.io.files import TEMPORARY, parse_json, read_json, safe_join, storage_errors, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 4 * 2**20
"""Largest header that is read, in bytes: room for about 30 000 tensors in one file."""
DELIMITER_LIMIT = 300_000
"""Most brackets and commas in a header; it bounds the memory that parsing takes (a legitimate tensor has about 10)."""
LISTED = 100
"""Most problems that one error lists."""

_BITS = dict.fromkeys(("F64", "I64", "U64", "C64"), 64) | dict.fromkeys(("F32", "I32", "U32"), 32)
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16) | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8)
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
FLOATING = ("F64", "F32", "F16", "BF16")
_CODES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL"}
_CODES |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}
_CODES |= {f"{u}int{bits}": f"{'U' if u else 'I'}{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)}


class Header(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    """Safetensors code, such as "BF16"."""
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    """First byte and end in the file's data section."""


class Reader(Protocol):
    """Where a model's tensors come from, by name."""

    def names(self) -> list[str]:
        """The names of all tensors."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading any data."""

    def dtypes(self) -> dict[str, str]:
        """Name -> safetensors code of the dtype, without reading any data."""

    def get(self, name: str) -> Tensor:
        """One tensor."""


class HasShapes(Protocol):
    """An anatomy, as far as `check_tensors` looks at it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""


def read_header(path: str | Path) -> dict[str, Header]:
    """Read and check a safetensors file's header; raise `ArtifactError` that names the file for anything out of order.

    Reads the header alone, at most `HEADER_LIMIT` bytes. Tensors must fill the data section without gap or overlap.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > size - 8:
                raise _broken(path, f"a header of {length} bytes in a file of {size}")
            if length > HEADER_LIMIT:
                raise _broken(path, f"a header of {length} bytes; at most {HEADER_LIMIT} are read")
            raw = file.read(length)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    if sum(raw.count(delimiter) for delimiter in (b"[", b"{", b",")) > DELIMITER_LIMIT:
        raise _broken(path, "a header of too many parts")
    values = parse_json(raw, str(path), unique_keys=True)
    if not raw.startswith(b"{") or not isinstance(values, dict):
        raise _broken(path, "a header that is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "metadata that is not text to text")
    headers = {name: _entry(path, name, entry) for name, entry in values.items()}
    _check_layout(path, headers, size - 8 - length)
    return headers


def _broken(path: Path, found: str, where: str = "header") -> ArtifactError:
    return ArtifactError(f"{path}: not a sound safetensors file", [Problem(where, found, "The file is damaged; get it again.")])


def _entry(path: Path, name: str, entry: Any) -> Header:
    shown = repr(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, "an entry without exactly dtype, shape and data_offsets", shown)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _broken(path, f"dtype {str(dtype)[:40]!r}", shown)
    if not _sizes(shape) or len(shape) > 16 or not _sizes(offsets) or len(offsets) != 2:
        raise _broken(path, "a shape or offsets that are not lists of whole numbers", shown)
    elements = 1
    for extent in shape:
        elements *= extent
    if elements * bits != (offsets[1] - offsets[0]) * 8:
        raise _broken(path, f"{dtype} of shape {shape} in {offsets[1] - offsets[0]} bytes", shown)
    return Header(dtype, tuple(shape), (offsets[0], offsets[1]))


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, headers: Mapping[str, Header], length: int) -> None:
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].offsets):
        if header.offsets[0] != end:
            raise _broken(path, f"data from byte {header.offsets[0]} where {end} is due (gap or overlap)", repr(name[:100]))
        end = header.offsets[1]
    if end != length:
        raise _broken(path, f"{length} bytes of data where {end} are due", "data")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, every dtype as it is. Copies at most one tensor at a time, and none that is contiguous on the CPU.

    Raises `StorageError` where the disk is full or the path cannot be written; nothing is flushed, publishing does that.
    """
    import torch

    # widest elements first keeps every tensor aligned to its element size, as readers that map the file need
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in order:
        end = offset + tensor.numel() * tensor.element_size()
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with storage_errors(path, 8 + len(raw) + offset), open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in order:
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class TensorReader:
    """The tensors of a Hugging Face directory: `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` names.

    All headers are read and checked at once, no data. Raises `ArtifactError` for a directory without such files, a damaged
    header, a shard name that leads out of the directory, and an index that does not agree with its shards.
    """

    def __init__(self, directory: str | Path, stem: str = "model") -> None:
        self.directory = Path(directory)
        single, index = self.directory / f"{stem}.safetensors", self.directory / f"{stem}.safetensors.index.json"
        if single.is_file():  # transformers, too, takes the single file where both exist
            self.files = [safe_join(self.directory, single.name)]
            weight_map = None
        elif index.is_file():
            weight_map = _weight_map(safe_join(self.directory, index.name))
            self.files = [safe_join(self.directory, name) for name in sorted(set(weight_map.values()))]
        else:
            raise _no_tensors(self.directory, stem)
        self._headers: dict[str, Header] = {}
        self._file_of: dict[str, Path] = {}
        twice = []
        for path in self.files:
            for name, header in read_header(path).items():
                if name in self._headers:
                    twice.append(Problem(name, f"in {self._file_of[name].name} and in {path.name}", "Keep it in one."))
                self._headers[name], self._file_of[name] = header, path
        problems = twice + (self._disagreements(weight_map) if weight_map is not None else [])
        if problems:
            raise ArtifactError(f"{self.directory}: the index and its shards do not agree", shortened(problems))

    def _disagreements(self, weight_map: Mapping[str, str]) -> list[Problem]:
        found = {name: path.name for name, path in self._file_of.items()}
        remedy = "Get the model's files again; they may be of different versions."
        return [
            Problem(name, f"in {found.get(name, 'no shard')}, by the index in {weight_map.get(name, 'no shard')}", remedy)
            for name in sorted(found.keys() | weight_map.keys())
            if found.get(name) != (Path(weight_map[name]).name if name in weight_map else None)
        ]

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._headers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the headers."""
        return {name: header.shape for name, header in self._headers.items()}

    def dtypes(self) -> dict[str, str]:
        """Name -> safetensors code of the dtype, from the headers."""
        return {name: header.dtype for name, header in self._headers.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from its file (private, so writing to it does not reach the file). Unknown: `KeyError`."""
        from safetensors import SafetensorError, safe_open

        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _broken(path, str(error), name) from None
        return tensor


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path, unique_keys=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        remedy = "An index maps tensor names to shard files; get it again."
        raise ArtifactError(f"{path}: not an index of shards", [Problem("weight_map", str(weight_map)[:80], remedy)])
    bad = sorted({shard for shard in weight_map.values() if not shard.endswith(".safetensors")})
    if bad:
        raise ArtifactError(f"{path}: names shards that are not safetensors", [Problem("weight_map", ", ".join(bad)[:200], _CONVERT)])
    return weight_map


_CONVERT = "Convert the model to safetensors with a tool you trust: pickled weights (.bin, .pt) can run code and are never opened."


def _no_tensors(directory: Path, stem: str) -> ArtifactError:
    if not directory.is_dir():
        remedy = "Give a Hugging Face model directory."
        return ArtifactError(f"{directory}: no such directory", [Problem("directory", "nothing there", remedy)])
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    found, remedy = (", ".join(pickled[:5]), _CONVERT) if pickled else ("none", "Put the model's safetensors files there.")
    return ArtifactError(f"{directory}: no {stem}.safetensors and no {stem}.safetensors.index.json", [Problem("weights", found, remedy)])


class MemoryReader:
    """A `Reader` over tensors in memory, such as a trained model's state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Name -> safetensors code of the dtype."""
        return {name: _CODES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, not copied."""
        return self._tensors[name]


class ShardWriter:
    """Writes tensors as `STEM.safetensors`, or as `STEM-0000i-of-0000n.safetensors` with an index; holds one shard at a time.

    `add` keeps the tensor until its shard is full: do not change it afterwards. Files get their names at `close()`, the index
    last, so that an interrupted write leaves neither. As a context manager it closes on success and removes its files on error.
    """

    def __init__(self, directory: str | Path, max_shard_bytes: int | float = 5e9, stem: str = "model") -> None:
        self.directory, self._limit, self._stem = Path(directory), max_shard_bytes, stem
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._parts: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. A name given twice is a `ValueError`; a full disk a `StorageError`."""
        if name in self._names:
            raise ValueError(f"tensor {name!r} was written already")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> list[Path]:
        """Write what is left, give the shards their names, then write the index. Returns the files written."""
        if self._pending or not self._parts:
            self._flush()
        count = len(self._parts)
        names = [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [f"{self._stem}.safetensors"]
        files = [self.directory / name for name in names]
        with storage_errors(self.directory):
            for i, path in enumerate(files):
                os.rename(self._part(i), path)
        if count > 1:
            weight_map = {tensor: name for name, part in zip(names, self._parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            files.append(self.directory / f"{self._stem}.safetensors.index.json")
            write_atomic(files[-1], json.dumps(index, indent=2) + "\n")
        return files

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:  # after a full close there is nothing left to remove
            self._pending.clear()
            for i in range(len(self._parts) + 1):
                self._part(i).unlink(missing_ok=True)

    def _part(self, index: int) -> Path:
        return self.directory / f"{TEMPORARY}{self._stem}-{index + 1:05d}.safetensors"

    def _flush(self) -> None:
        write_tensors(self._part(len(self._parts)), self._pending, {"format": "pt"})
        self._parts.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def check_tensors(reader: Reader, anatomy: HasShapes, where: str = "model") -> None:
    """Raise one `ArtifactError` that lists every tensor missing, unknown, of a wrong shape, or not floating-point.

    Rotary `inv_freq` buffers are tolerated, and so is the `lm_head.weight` that some files of tied models hold beside its twin.
    """
    expected, shapes, dtypes = anatomy.shapes(), reader.shapes(), reader.dtypes()
    apart = "Weights and config do not belong together; get the model again."
    problems = []
    for name, shape in expected.items():
        if name not in shapes:
            problems.append(Problem(name, "no such tensor", f"By the config there is one of shape {shape}. {apart}"))
        elif shapes[name] != shape:
            problems.append(Problem(name, f"shape {shapes[name]}", f"By the config it is {shape}. {apart}"))
        elif dtypes[name] not in FLOATING:
            problems.append(Problem(name, f"dtype {dtypes[name]}", "Quantised weights cannot be sheared; take the unquantised model."))
    embedding = next(iter(expected.values()))  # the first tensor of every model
    for name, shape in shapes.items():
        twin = name == "lm_head.weight" and shape == embedding
        if name not in expected and not twin and not name.endswith("rotary_emb.inv_freq"):
            problems.append(Problem(name, "an unknown tensor", f"By the config there is none. {apart}"))
    if problems:
        raise ArtifactError(f"{where}: {len(problems)} tensors are not what the config says", shortened(problems))


def shortened(problems: list[Problem]) -> list[Problem]:
    """At most `LISTED` problems; the last then counts the rest."""
    rest = len(problems) - LISTED
    return problems if rest <= 0 else [*problems[:LISTED], Problem("and", f"{rest} more", "Mend these first.")]
