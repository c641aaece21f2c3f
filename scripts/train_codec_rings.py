#!/usr/bin/env python3
"""Train the rings of the polar codes in native/monarch-codec-tables.h, and set the units of their integer points.

    python scripts/train_codec_rings.py             train and print them, with the error
    python scripts/train_codec_rings.py --write     and put them into the header
    python scripts/train_codec_rings.py --nmse      print the errors of the rings in use, as in docs/codec.md

Lloyd iteration over whole records: encode Gaussian head vectors as the codec does, scale search included, then move
every ring to the radius that fits its pairs best. Same seed, same numpy: same tables.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from monarch_llamacpp import codec  # noqa: E402
from monarch_llamacpp.paths import native_dir  # noqa: E402


def first_rings(bits: int, rng: np.random.Generator) -> np.ndarray:
    """Quantiles of a distribution that is wider than the radii themselves, as the best rings are."""
    n = 1 << bits
    radii = np.hypot(*rng.standard_normal((2, 100_000))) * 1.2
    return np.quantile(radii, (np.arange(n) + 0.5) / n).astype(np.float32)


def move_rings(code: codec.Polar, records: list[np.ndarray]) -> np.ndarray:
    dots, norms = np.zeros(len(code.radius)), np.zeros(len(code.radius))
    for x in records:
        codes, scale = codec.encode_rotated(code, x)
        scale = scale.astype(np.float32)[..., None] * code.unit
        direction = codes & ((2 << code.bits) - 1)
        first, second = np.split(x, 2, -1)
        along = first * code.cosine[direction] + second * code.sine[direction]
        rings = codes >> code.bits
        dots += np.bincount(rings.ravel(), (along * scale).ravel(), len(code.radius))
        norms += np.bincount(rings.ravel(), np.broadcast_to(scale * scale, rings.shape).ravel(), len(code.radius))
    return (dots / np.maximum(norms, 1e-9)).astype(np.float32)


def with_rings(bits: int, radius: np.ndarray) -> codec.Polar:
    code = replace(codec.polar(bits), radius=radius)
    parity = np.arange(len(radius)) & 1
    greatest = np.abs([code.cosine.reshape(2, -1), code.sine.reshape(2, -1)]).max((0, 2))
    return replace(code, unit=np.float32(127) / (radius * greatest[parity]).max())


def train(bits: int, n_values: int, n_steps: int) -> np.ndarray:
    rng = np.random.default_rng(bits)
    radius = first_rings(bits, rng)
    records = [rng.standard_normal((n_values // d, d), np.float32) for d in (64, 128)]
    for step in range(n_steps):
        code = with_rings(bits, radius)
        radius = move_rings(code, records)
        if (step + 1) % 10 == 0:
            errors = ", ".join(f"{nmse(code, x):.5f}" for x in records)
            print(f"{bits} bits, step {step + 1}: NMSE {errors} (64, 128 values)", file=sys.stderr)
    return radius


def nmse(code: codec.Polar, x: np.ndarray) -> float:
    codes, scale = codec.encode_rotated(code, x)
    rest = x - code.decode(codes, scale)
    return float((rest.astype(np.float64) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def write(rings: dict[int, np.ndarray]) -> None:
    header = native_dir() / "monarch-codec-tables.h"
    text = header.read_text(encoding="utf-8")
    for bits, radius in rings.items():
        radius = np.array([float(f"{r:.6f}") for r in radius], np.float32)
        text = define(text, f"MONARCH_RADIUS_{bits}", radius)
        text = define(text, f"MONARCH_UNIT_{bits}", np.array([with_rings(bits, radius).unit]))
    header.write_text(text, encoding="utf-8")


def define(text: str, name: str, values: np.ndarray) -> str:
    text, n = re.subn(rf"(#define {name} +).*", rf"\g<1>{literals(values)}", text)
    assert n == 1, f"{name} is not there exactly once"
    return text


def literals(values: np.ndarray) -> str:
    return ", ".join(f"{v:.6f}f" for v in values)


def one_huge(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[:, 3] = 30
    return x


def record_nmse(x: np.ndarray, bits: int, residual: bool = False) -> float:
    rest = codec.rotate(x) - codec.encode(x, bits, residual).decode()
    return float((rest.astype(np.float64) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def errors(x: np.ndarray) -> list[float]:
    """One row of the table in docs/codec.md."""
    return [
        record_nmse(x, 4),
        record_nmse(one_huge(x), 4),
        record_nmse(x, 4, residual=True),
        record_nmse(x, 3),
        record_nmse(x, 2),
    ]


def print_errors() -> None:
    for head_dim in (32, 64, 80, 96, 128, 192, 256):
        x = np.random.default_rng(head_dim).standard_normal((600_000 // head_dim, head_dim), np.float32)
        print(f"| {head_dim} | " + " | ".join(f"{e:.4f}" for e in errors(x)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into the header")
    parser.add_argument("--nmse", action="store_true", help="print the errors of the rings in use")
    parser.add_argument("--values", type=int, default=600_000, help="Gaussian values per record size")
    parser.add_argument("--steps", type=int, default=120, help="Lloyd iterations")
    args = parser.parse_args()

    if args.nmse:
        print_errors()
        return
    rings = {bits: train(bits, args.values, args.steps) for bits in codec.BITS}
    for bits, radius in rings.items():
        print(f"{bits} bits: {literals(radius)}")
    if args.write:
        write(rings)


if __name__ == "__main__":
    main()
