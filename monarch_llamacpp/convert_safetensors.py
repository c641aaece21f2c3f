"""Reads sharded and single safetensors by memory map, trusting nothing that their headers say."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .convert_source import check_is_file, first_line, read_json
from .errors import MonarchError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

MAX_HEADER_BYTES = 100 * 2**20  # as the format's own library

# what a checkpoint may hold; bf16 is read as its bits
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, [rows, columns] or [columns]."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def open(self) -> np.ndarray:
        """The values as they are stored; mapped until the array goes, so that only one tensor is in memory."""
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def to_f32(values: np.ndarray) -> np.ndarray:
    if values.dtype == DTYPES["BF16"]:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


class Checkpoint:
    """All tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        wanted = read_index(folder / INDEX) if (folder / INDEX).exists() else {}
        shards = sorted(set(wanted.values())) or [SINGLE]
        for shard in shards:
            self._add_shard(folder / shard)
        for name, shard in wanted.items():
            if name not in self.tensors:
                raise MonarchError(f"{folder / shard} lacks the tensor {name} that {INDEX} promises; fetch it again")

    def _add_shard(self, path: Path) -> None:
        for tensor in read_shard(path):
            if tensor.name in self.tensors:
                raise MonarchError(f"{path}: the tensor {tensor.name} is there twice; fetch the checkpoint again")
            self.tensors[tensor.name] = tensor


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor; shards are plain names in the same folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MonarchError(f"{path} has no weight_map; fetch it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise MonarchError(f"{path} names {shard!r} as a shard: not a safetensors file of this folder")
    return weight_map


def read_shard(path: Path) -> list[Tensor]:
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes < 8:
                raise MonarchError(f"{path} is too short for safetensors; fetch it again")
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > min(n_bytes - 8, MAX_HEADER_BYTES):
                raise MonarchError(f"{path}: the header claims {header_size} bytes of {n_bytes}; fetch it again")
            header = parse_header(path, file.read(header_size))
    except FileNotFoundError as error:
        raise MonarchError(f"{path} is missing: convert needs safetensors; fetch the whole checkpoint") from error
    start = 8 + header_size
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    tensors = [read_tensor(path, name, entry, start, n_bytes - start) for name, entry in entries]
    refuse_overlaps(tensors)
    return tensors


def refuse_overlaps(tensors: list[Tensor]) -> None:
    tensors = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in zip(tensors, tensors[1:], strict=False):
        if before.offset + before.n_bytes > after.offset:
            raise MonarchError(f"{after.path}: {before.name} and {after.name} overlap; fetch it again")


def parse_header(path: Path, data: bytes) -> dict:
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        raise MonarchError(f"{path}: the header is not valid JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(header, dict):
        raise MonarchError(f"{path}: the header is no JSON object; fetch it again")
    return header


def refuse_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    res = dict(pairs)
    if len(res) != len(pairs):
        raise ValueError("a name is there twice")
    return res


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_tensor(path: Path, name: str, entry: object, body_start: int, body_size: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MonarchError(f"{path}: {name} has the type {dtype!r}; convert reads {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(is_size(n) and n > 0 for n in shape):
        raise MonarchError(f"{path}: {name} has the shape {shape!r}; expected one or two sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise MonarchError(f"{path}: {name} has the offsets {offsets!r}; expected a start and an end")
    start, end = offsets
    if not start <= end <= body_size:
        raise MonarchError(f"{path}: {name} lies at {start} to {end}, beyond the file's end; fetch it again")
    res = Tensor(name, dtype, tuple(shape), path, body_start + start)
    if end - start != res.n_bytes:
        raise MonarchError(f"{path}: {name} has {end - start} bytes, not what {dtype} {shape} takes; fetch it again")
    return res
