"""Checkpoints damaged at random: `convert` writes a GGUF, or gives one line and leaves nothing."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from convert_checkpoints import CHECKPOINTS, write_checkpoint

from monarch_llamacpp.convert import convert
from monarch_llamacpp.errors import MonarchError

VALUES = [None, True, -1, 0, 1, 2**31, 2**70, 1e300, float("nan"), "", "x", "\ud800", [], {}, [1], [None], {"a": 1}]


def damage_value(rng: random.Random, value: object) -> object:
    """One leaf or branch of it replaced or taken away."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        value.pop(key)
    else:
        value[key] = damage_value(rng, value[key])
    return value


def damage_bytes(rng: random.Random, data: bytes, n_bytes: int) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(n_bytes)] = rng.randrange(256)
    return bytes(data)


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return damage_bytes(rng, data, start)
    header = json.dumps(damage_value(rng, json.loads(data[8:start]))).encode()
    return len(header).to_bytes(8, "little") + header + data[start:]


def damage_other(rng: random.Random, data: bytes) -> bytes:
    return damage_bytes(rng, data, len(data))


def damage_json(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(damage_value(rng, json.loads(data))).encode()


DAMAGE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": damage_json,
    ".safetensors": damage_safetensors,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_random_damage(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    write_checkpoint(tmp_path / "good", name, n_shards=1)
    files = sorted(path.name for path in (tmp_path / "good").iterdir())
    n_refused = 0
    for _ in range(60):
        folder, out = tmp_path / "damaged", tmp_path / "out" / "x.gguf"
        shutil.copytree(tmp_path / "good", folder)
        out.parent.mkdir()
        path = folder / rng.choice(files)
        path.write_bytes(DAMAGE.get(path.suffix, damage_other)(rng, path.read_bytes()))
        try:
            convert(folder, out, "f16", "x")
            assert gguf.GGUFReader(out).tensors
        except MonarchError as error:
            n_refused += 1
            assert "\n" not in str(error) and not list(out.parent.iterdir()), error
        shutil.rmtree(folder)
        shutil.rmtree(out.parent)
    assert n_refused > 10
