"""Protocol buffers without the package: a message as its numbered fields, which is all that reading logs needs.

The format is https://protobuf.dev/programming-guides/encoding: a key (field number, wire type) before each value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | float | bytes


class Damaged(ValueError):
    """Bytes that are no message."""


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of every field: whole numbers, 8-byte and 4-byte floats, or bytes (text, a message, packed values).

    Fixed-width values are taken for floats, as in all messages that are read here. Raises Damaged.
    """
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        value: Value
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            size, code = (8, "<d") if kind == 1 else (4, "<f")
            if at + size > end:
                raise Damaged("cut short")
            value, at = struct.unpack_from(code, message, at)[0], at + size
        elif kind == 2:
            size, at = _varint(message, at)
            if at + size > end:
                raise Damaged("cut short")
            value, at = message[at : at + size], at + size
        else:
            raise Damaged(f"wire type {kind}")
        yield key >> 3, value


def first(message: bytes, number: int) -> bytes:
    """The bytes of the last field with this number, which is the one that counts; none if there is none."""
    found = b""
    for at, value in fields(message):
        if at == number and isinstance(value, bytes):
            found = value
    return found


def text(value: Value) -> str:
    """A field of text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise Damaged("no whole number")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
