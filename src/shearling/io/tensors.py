"""Tensors in files: a reader of model directories and a writer, one shard at a time.

Everything is checked from the files' headers before any tensor is opened; torch is imported only where one is.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shearling.errors import ArtifactError, Problem
from shearling.io.files import TEMPORARY, read_json, safe_join, storage_errors, write_atomic
from shearling.io.headers import Header, broken, read_header

if TYPE_CHECKING:
    from torch import Tensor

SHARDS = 2000
"""Most files of one model that are opened."""
LISTED = 100
"""Most problems that one error lists."""
CHUNK = 4 * 2**20
"""Bytes that are hashed and written at a time; a chunk that is hashed lies in the processor's cache when it is written."""

FLOATING = ("F64", "F32", "F16", "BF16")
_CODES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL"}
_CODES |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}
_CODES |= {f"{u}int{bits}": f"{'U' if u else 'I'}{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)}


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


class Written(NamedTuple):
    """What a file holds, told by its writer, so that nobody has to read it again."""

    sha256: str
    """Of the whole file, as 64 hex digits."""
    size: int
    """Bytes."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write one safetensors file, every dtype as it is; return its SHA-256 and size, computed while writing.

    Copies at most one tensor at a time, and none that is contiguous on the CPU. Raises `StorageError` where the disk is full or the
    path cannot be written; nothing is flushed, publishing does that.
    """
    # widest elements first keeps every tensor aligned to its element size, as readers that map the file need
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in order:
        end = offset + tensor.numel() * tensor.element_size()
        code = _CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    digest, size = hashlib.sha256(), 8 + len(raw) + offset
    with storage_errors(path, size), open(path, "wb") as file:
        for chunk in (len(raw).to_bytes(8, "little"), raw):
            digest.update(chunk)
            file.write(chunk)
        for _, tensor in order:
            for piece in _chunks(tensor):
                digest.update(piece)
                file.write(piece)
    return Written(digest.hexdigest(), size)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, at most `CHUNK` at a time, not copied where it is contiguous on the CPU."""
    import torch

    if tensor.numel():
        data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


class TensorReader:
    """The tensors of a Hugging Face directory: `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` names.

    All headers are read and checked at once, no data. Raises one `ArtifactError` with every problem: a directory without such
    files, damaged headers, shard names that lead out of the directory, an index that does not agree with its shards, and, where
    an `anatomy` is given, tensors that are not what it says (see `check_tensors`).
    """

    def __init__(self, directory: str | Path, stem: str = "model", anatomy: HasShapes | None = None) -> None:
        self.directory = Path(directory)
        shards, weight_map = _find_shards(self.directory, stem)
        self._headers: dict[str, Header] = {}
        self._shard_of: dict[str, str] = {}
        damaged: dict[str, ArtifactError] = {}
        problems = []
        for shard in shards:
            try:
                headers = read_header(safe_join(self.directory, shard))
            except ArtifactError as error:
                damaged[shard] = error
                continue
            for name, header in headers.items():
                if name in self._headers:
                    problems.append(Problem(shown(name), f"in {self._shard_of[name]} and in {shard}", "Keep it in one."))
                self._headers[name], self._shard_of[name] = header, shard
        self.files = [self.directory / shard for shard in shards]
        unread = {name for name, shard in (weight_map or {}).items() if shard in damaged}
        if weight_map is not None:
            problems += self._disagreements(weight_map, unread)
        if anatomy is not None and (weight_map or not damaged):
            problems += tensor_problems(self, anatomy, unread)
        if len(damaged) == 1 and not problems:
            raise next(iter(damaged.values()))
        torn = [Problem(f"{shard}: {p.field}", p.found, p.remedy) for shard, error in damaged.items() for p in error.problems]
        if torn or problems:
            raise ArtifactError(f"{self.directory}: {len(torn + problems)} problems with its weights", shortened(torn + problems))

    def _disagreements(self, weight_map: Mapping[str, str], unread: Collection[str]) -> list[Problem]:
        found, remedy = self._shard_of, "Get the model's files again; they may be of different versions."
        return [
            Problem(shown(name), f"in {found.get(name, 'no shard')}, by the index in {weight_map.get(name, 'no shard')}", remedy)
            for name in sorted(found.keys() | weight_map.keys())
            if found.get(name) != weight_map.get(name) and name not in unread
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

        path = self.directory / self._shard_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise broken(path, str(error), name) from None
        return tensor


def _find_shards(directory: Path, stem: str) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files that hold the tensors, sorted, and the index's table, where there is one."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if (directory / single).is_file():  # transformers, too, takes the single file where both exist
        return [single], None
    if not (directory / index).is_file():
        raise _no_tensors(directory, stem)
    weight_map = _weight_map(safe_join(directory, index))
    return sorted(set(weight_map.values())), weight_map


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        remedy = "An index maps tensor names to shard files; get it again."
        raise ArtifactError(f"{path}: not an index of shards", [Problem("weight_map", reprlib.repr(weight_map), remedy)])
    if len(set(weight_map.values())) > SHARDS:
        remedy = f"A model of more than {SHARDS} files is not read; save it in larger shards."
        raise ArtifactError(f"{path}: too many shards", [Problem("weight_map", f"{len(set(weight_map.values()))} shards", remedy)])
    bad = sorted({shard for shard in weight_map.values() if not shard.endswith(".safetensors")})
    if bad:
        raise ArtifactError(f"{path}: names shards that are not safetensors", [Problem("weight_map", ", ".join(bad)[:200], _CONVERT)])
    return weight_map


PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".metadata", ".npy", ".npz")
"""Endings of files that hold pickles, or may; `.metadata` is the file of a torch distributed checkpoint (DCP)."""
_CONVERT = "Convert the model to safetensors with a tool you trust: pickled weights (.bin, .pt, DCP) can run code and are never opened."


def _no_tensors(directory: Path, stem: str) -> ArtifactError:
    if not directory.is_dir():
        remedy = "Give a Hugging Face model directory."
        return ArtifactError(f"{directory}: no such directory", [Problem("directory", "nothing there", remedy)])
    pickled = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLED))
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
    problems = tensor_problems(reader, anatomy)
    if problems:
        raise ArtifactError(f"{where}: {len(problems)} tensors are not what the config says", shortened(problems))


def tensor_problems(reader: Reader, anatomy: HasShapes, unread: Collection[str] = ()) -> list[Problem]:
    """What `check_tensors` complains of; tensors in `unread` are not missed."""
    expected, shapes, dtypes = anatomy.shapes(), reader.shapes(), reader.dtypes()
    apart = "Weights and config do not belong together; get the model again."
    problems = []
    for name, shape in expected.items():
        if name not in shapes:
            if name not in unread:
                problems.append(Problem(name, "no such tensor", f"By the config there is one of shape {shape}. {apart}"))
        elif shapes[name] != shape:
            problems.append(Problem(name, f"shape {shapes[name]}", f"By the config it is {shape}. {apart}"))
        elif dtypes[name] not in FLOATING:
            problems.append(Problem(name, f"dtype {dtypes[name]}", "Quantised weights cannot be sheared; take the unquantised model."))
    embedding = next(iter(expected.values()))  # the first tensor of every model
    for name, shape in shapes.items():
        twin = name == "lm_head.weight" and shape == embedding
        if name not in expected and not twin and not name.endswith("rotary_emb.inv_freq"):
            problems.append(Problem(shown(name), "an unknown tensor", f"By the config there is none. {apart}"))
    return problems


def shown(name: str) -> str:
    """A name read from a file, as a message may hold it: short, and without characters that would steer a terminal."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])


def shortened(problems: list[Problem]) -> list[Problem]:
    """At most `LISTED` problems; the last then counts the rest."""
    rest = len(problems) - LISTED
    return problems if rest <= 0 else [*problems[:LISTED], Problem("and", f"{rest} more", "Mend these first.")]
