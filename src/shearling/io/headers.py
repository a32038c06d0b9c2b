"""Safetensors headers, read strictly: whatever a file claims, reading it costs little memory, and a false claim is refused.

A safetensors file is 8 bytes (the header's length N, little-endian), N bytes of JSON (name -> dtype, shape, data_offsets), then
the data. Imports no torch.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shearling.errors import ArtifactError, Problem
from shearling.io.files import JSON_LIMIT, parse_json

HEADER_LIMIT = JSON_LIMIT
"""Largest header that is read, in bytes: room for about 15 000 tensors in one file."""

_BITS = dict.fromkeys(("F64", "I64", "U64", "C64"), 64) | dict.fromkeys(("F32", "I32", "U32"), 32)
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16) | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8)
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


class Header(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    """Safetensors code, such as "BF16"."""
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    """First byte and end in the file's data section."""


def read_header(path: str | Path) -> dict[str, Header]:
    """Read and check a safetensors file's header; raise `ArtifactError` that names the file for anything out of order.

    Reads the header alone, at most `HEADER_LIMIT` bytes. Tensors must fill the data section without gap or overlap.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(HEADER_LIMIT, size - 8) else b""
    except OSError as error:
        raise broken(path, error.strerror or str(error)) from None
    if size < 10 or length > size - 8:
        raise broken(path, f"a header of {length} bytes in a file of {size}")
    if length > HEADER_LIMIT:
        raise broken(path, f"a header of {length} bytes; at most {HEADER_LIMIT} are read")
    values = parse_json(raw, str(path))
    if not raw.startswith(b"{") or not isinstance(values, dict):
        raise broken(path, "a header that is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(path, "metadata that is not text to text")
    headers = {name: _entry(path, name, entry) for name, entry in values.items()}
    _check_layout(path, headers, size - 8 - length)
    return headers


def broken(path: Path, found: str, where: str = "header") -> ArtifactError:
    """The error that a safetensors file is not sound: what was found there, and in which part of it."""
    return ArtifactError(f"{path}: not a sound safetensors file", [Problem(where, found, "The file is damaged; get it again.")])


def _entry(path: Path, name: str, entry: Any) -> Header:
    shown = repr(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, "an entry without exactly dtype, shape and data_offsets", shown)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise broken(path, f"dtype {reprlib.repr(dtype)}", shown)
    if not _sizes(shape) or len(shape) > 16 or not _sizes(offsets) or len(offsets) != 2:
        raise broken(path, "a shape or offsets that are not lists of whole numbers", shown)
    elements = 1
    for extent in shape:
        elements *= extent
    if elements * bits != (offsets[1] - offsets[0]) * 8:
        raise broken(path, f"{dtype} of shape {shape} in {offsets[1] - offsets[0]} bytes", shown)
    return Header(dtype, tuple(shape), (offsets[0], offsets[1]))


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, headers: Mapping[str, Header], length: int) -> None:
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].offsets):
        if header.offsets[0] != end:
            raise broken(path, f"data from byte {header.offsets[0]} where {end} is due (gap or overlap)", repr(name[:100]))
        end = header.offsets[1]
    if end != length:
        raise broken(path, f"{length} bytes of data where {end} are due", "data")
