"""Reads the pieces of a SentencePiece model: the few fields of its protobuf that a GGUF needs, trusting nothing."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf

from .convert_source import read_bytes
from .errors import MonarchError

# of sentencepiece_model.proto
PIECES = 1
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# by the number in the protobuf; upstream takes a piece that the user defined for a normal one
TYPES = {
    1: gguf.TokenType.NORMAL,
    2: gguf.TokenType.UNKNOWN,
    3: gguf.TokenType.CONTROL,
    4: gguf.TokenType.NORMAL,
    5: gguf.TokenType.UNUSED,
    6: gguf.TokenType.BYTE,
}


@dataclass(frozen=True)
class Piece:
    text: bytes
    score: float
    type: gguf.TokenType


def read_pieces(path: Path) -> list[Piece]:
    try:
        pieces = [read_piece(value) for field, value in read_fields(read_bytes(path)) if field == PIECES]
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise MonarchError(f"{path} is not a SentencePiece model; fetch it again") from error
    if not pieces:
        raise MonarchError(f"{path} holds no pieces; fetch it again")
    return pieces


def read_piece(data: bytes) -> Piece:
    fields = {PIECE_TEXT: b"", PIECE_SCORE: bytes(4), PIECE_TYPE: 1} | dict(read_fields(data))
    (score,) = struct.unpack("<f", fields[PIECE_SCORE])
    kind = TYPES.get(fields[PIECE_TYPE])
    if not fields[PIECE_TEXT].decode("utf-8") or not math.isfinite(score) or kind is None:
        raise ValueError("a piece without a text, a score or a type")
    return Piece(fields[PIECE_TEXT], score, kind)


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of one message; fixed sizes as their bytes."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = read_varint(data, at)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if wire == BYTES:
            size, at = read_varint(data, at)
        if size is None or size > len(data) - at:
            raise ValueError("a field beyond the end")
        yield key >> 3, data[at : at + size]
        at += size


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    res = 0
    for shift in range(0, 64, 7):
        res |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return res, at
    raise ValueError("a number of more than 64 bits")
