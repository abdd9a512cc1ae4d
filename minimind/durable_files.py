"""Files that have reached the disk when the call returns, tensors among them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the safetensors format: length of the header, header in JSON, then the bytes end to end.

    Written here rather than by the library, which holds the interpreter's lock meanwhile and so would stop
    training, and which hides the number of an operating system's error.
    """
    header: dict[str, Any] = {}
    offset = 0
    # Wide types first, so that every tensor is aligned to its own width.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in ordered:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy() for name in ordered)
    return write_file(file, [struct.pack("<Q", len(encoded)), encoded, *data])


def write_file(file: Path, parts: list[Any]) -> dict[str, Any]:
    """Write bytes-like parts to a new file and force them to the disk.

    Returns:
        The size and the SHA-256 of the file, as a manifest records them.

    Raises:
        OSError: with the path as `filename`.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("wb", buffering=0) as stream:
            for part in parts:
                rest = memoryview(part)
                digest.update(rest)
                size += len(rest)
                while rest:  # an unbuffered write may take less than it was given
                    rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(file)  # a failed write does not say where
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that a rename outlives a power cut."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
