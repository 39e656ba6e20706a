"""Files of a checkpoint: bytes, or tensors as safetensors, hashed while they are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# fmt: off
DTYPE_NAMES = {  # of safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}
# fmt: on

Content = dict[str, Tensor] | bytes  # of one file


def _safetensors_chunks(content: Content) -> Iterator[bytes | memoryview]:
    """The bytes of a file. Tensors: as safetensors, without a copy; its own writer makes two and holds the GIL."""
    if isinstance(content, bytes):
        yield content
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in content.items():
        begin, end = end, end + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in content.values():
        yield tensor.flatten().view(torch.uint8).numpy().data


def write_file(path: Path, content: Content) -> tuple[int, str]:
    """Create `path` and sync it; the size and SHA-256 of the very buffers that were written."""
    size, digest = 0, hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for piece in _safetensors_chunks(content):
                size += len(piece)
                digest.update(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        fault.filename = str(path)
        raise
    return size, digest.hexdigest()
