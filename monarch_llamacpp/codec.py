"""Numpy reference of native/monarch-codec.cpp and monarch-summary.cpp: the same bytes, in the same order of sums."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .errors import MonarchError
from .paths import native_dir

F16_MAX = np.float32(np.finfo(np.float16).max)
N_LANES = 8
BITS = (2, 3, 4)
N_PARTS = 8  # of a page, in a summary
SCALE_CODE_BIAS = (127 - 20) << 3
SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)  # of four 2-bit values in their byte

_NUMBER = r"-?[0-9][0-9.e+-]*f?"
_DEFINE = re.compile(rf"^#define (MONARCH_\w+) +({_NUMBER}(?:, *{_NUMBER})*)$", re.MULTILINE)


@lru_cache
def constants() -> dict[str, np.ndarray]:
    """Every table of numbers that the C headers define."""
    found = {}
    for header in ("monarch-codec-tables.h", "monarch-summary.h"):
        for name, numbers in _DEFINE.findall((native_dir() / header).read_text(encoding="utf-8")):
            found[name] = np.array([float(n.strip().rstrip("f")) for n in numbers.split(",")], np.float32)
    if not found:
        raise MonarchError(f"no codec tables in {native_dir()}: reinstall monarch_llamacpp")
    return found


@dataclass(frozen=True)
class Polar:
    """One code: 2**bits rings, each with 2**bits angles; those of odd rings lie half a step further."""

    bits: int
    radius: np.ndarray
    cosine: np.ndarray  # of even rings, then of odd rings
    sine: np.ndarray
    unit: np.float32

    def find_angles(self, x: np.ndarray, y: np.ndarray, parity: int) -> tuple[np.ndarray, np.ndarray]:
        """The direction of one parity with the greatest dot product: that product, and the index of the angle."""
        n = 1 << self.bits
        quadrant = slice(parity * n, parity * n + n // 4 + 1 - parity)
        dots = np.abs(x)[..., None] * self.cosine[quadrant] + np.abs(y)[..., None] * self.sine[quadrant]
        index = dots.argmax(-1)
        best = np.take_along_axis(dots, index[..., None], -1)[..., 0]
        index = np.where(x < 0, n // 2 - parity - index, index)
        index = np.where(y < 0, n - parity - index, index)
        return best, index & (n - 1)

    def find_rings(self, even: np.ndarray, odd: np.ndarray) -> np.ndarray:
        """The rings with the least error, given dot products divided by the scale."""
        rings = [self._nearest_ring(even, 0), self._nearest_ring(odd, 1)]
        radii = [self.radius[ring] for ring in rings]
        gain_even = radii[0] * (even + even - radii[0])
        gain_odd = radii[1] * (odd + odd - radii[1])
        return np.where(gain_odd > gain_even, rings[1], rings[0])

    def _nearest_ring(self, distance: np.ndarray, parity: int) -> np.ndarray:
        radius = self.radius[parity::2]
        middle = np.float32(0.5) * (radius[:-1] + radius[1:])
        return 2 * np.searchsorted(middle, distance, side="left") + parity

    @cached_property
    def point_table(self) -> np.ndarray:
        """The integer points of every code: x, y."""
        codes = np.arange(1 << 2 * self.bits)
        direction = codes & ((2 << self.bits) - 1)
        radius = self.radius[codes >> self.bits]
        points = [radius * self.cosine[direction] * self.unit, radius * self.sine[direction] * self.unit]
        return np.rint(points).astype(np.int8)

    def points(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., n_pairs] as integer points [..., 2 n_pairs], the x of all pairs first."""
        x, y = self.point_table
        return np.concatenate([x[codes], y[codes]], -1)

    def decode(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Codes [..., n_pairs] and f16 scales [...] as values [..., 2 n_pairs]."""
        return scale.astype(np.float32)[..., None] * self.points(codes).astype(np.float32)


@lru_cache
def polar(bits: int) -> Polar:
    tables = constants()
    rings = (tables[f"MONARCH_{name}_{bits}"] for name in ("RADIUS", "COSINE", "SINE"))
    return Polar(bits, *rings, tables[f"MONARCH_UNIT_{bits}"][0])


def finite(x: np.ndarray) -> np.ndarray:
    """NaN is zero, and everything fits into f16."""
    x = np.nan_to_num(np.asarray(x, np.float32), nan=0.0, posinf=F16_MAX, neginf=-F16_MAX)
    return x.clip(-F16_MAX, F16_MAX)


def sum_of_lanes(x: np.ndarray) -> np.ndarray:
    lanes = np.zeros((*x.shape[:-1], N_LANES), np.float32)
    for i in range(0, x.shape[-1], N_LANES):
        lanes += x[..., i : i + N_LANES]
    total = np.zeros(x.shape[:-1], np.float32)
    for j in range(N_LANES):
        total += lanes[..., j]
    return total


# rotation


def rotation_size(head_dim: int) -> int:
    """The greatest power of two that fits; the rest is covered by a second block, which overlaps the first."""
    return 1 << (head_dim.bit_length() - 1)


@lru_cache
def rotation_signs(first: int, n: int) -> np.ndarray:
    h = np.arange(first, first + n, dtype=np.uint32) * np.uint32(0x9E3779B1)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x85EBCA77)
    h ^= h >> np.uint32(13)
    return np.where(h & np.uint32(1), np.float32(-1), np.float32(1))


def _walsh_hadamard(x: np.ndarray) -> np.ndarray:
    n = x.shape[-1]
    half = 1
    while half < n:
        halves = x.reshape(*x.shape[:-1], -1, 2, half)
        a, b = halves[..., 0, :], halves[..., 1, :]
        x = np.stack([a + b, a - b], -2).reshape(x.shape)
        half *= 2
    return x * (np.float32(1) / np.sqrt(np.float32(n)))


def rotate(x: np.ndarray) -> np.ndarray:
    y, n = x.copy(), rotation_size(x.shape[-1])
    y[..., :n] = _walsh_hadamard(y[..., :n] * rotation_signs(0, n))
    if n < x.shape[-1]:
        y[..., -n:] = _walsh_hadamard(y[..., -n:] * rotation_signs(n, n))
    return y


def unrotate(x: np.ndarray) -> np.ndarray:
    y, n = x.copy(), rotation_size(x.shape[-1])
    if n < x.shape[-1]:
        y[..., -n:] = _walsh_hadamard(y[..., -n:]) * rotation_signs(n, n)
    y[..., :n] = _walsh_hadamard(y[..., :n]) * rotation_signs(0, n)
    return y


# records


@dataclass(frozen=True)
class Records:
    """Coded head vectors [..., head_dim]. The residual is absent, or one sign per value and one step per record."""

    bits: int
    codes: np.ndarray
    scale: np.ndarray
    negative: np.ndarray | None = None
    step: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """Rotated values."""
        x = polar(self.bits).decode(self.codes, self.scale)
        if self.step is None:
            return x
        step = self.step.astype(np.float32)[..., None]
        return x + np.where(self.negative, -step, step)


def _to_f16(x: np.ndarray) -> np.ndarray:
    return finite(x).astype(np.float16)


def _find_scale(code: Polar, even: np.ndarray, odd: np.ndarray, rms: np.ndarray) -> np.ndarray:
    inverse = np.float32(1) / (rms[..., None] * constants()["MONARCH_SCALE_FACTORS"])
    dots = np.zeros_like(inverse)
    norms = np.zeros_like(inverse)
    for p in range(even.shape[-1]):
        e, o = even[..., p, None], odd[..., p, None]
        ring = code.find_rings(e * inverse, o * inverse)
        radius = code.radius[ring]
        dots += radius * np.where(ring & 1, o, e)
        norms += radius * radius
    best = (dots * dots / norms).argmax(-1)[..., None]
    return (np.take_along_axis(dots, best, -1) / np.take_along_axis(norms, best, -1))[..., 0]


def _fit_scale(code: Polar, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The integer points are not quite the polar ones, so their scale is fitted by itself."""
    points = code.points(codes)
    products = x * points.astype(np.float32)
    n_pairs = codes.shape[-1]
    dots = sum_of_lanes(products[..., :n_pairs] + products[..., n_pairs:])
    return dots / np.square(points, dtype=np.int32).sum(-1).astype(np.float32)


def encode_rotated(code: Polar, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and f16 scales of finite, rotated vectors."""
    halves = np.split(x, 2, -1)
    even, index_even = code.find_angles(*halves, 0)
    odd, index_odd = code.find_angles(*halves, 1)

    def find_codes(scale: np.ndarray) -> np.ndarray:
        inverse = np.float32(1) / np.where(scale, scale, np.float32(1))[..., None]
        ring = code.find_rings(even * inverse, odd * inverse)
        return ring << code.bits | np.where(ring & 1, index_odd, index_even)

    rms = np.sqrt(sum_of_lanes(x * x) / np.float32(x.shape[-1]))
    least = constants()["MONARCH_LEAST_RMS"][0]
    codes = find_codes(_find_scale(code, even, odd, np.maximum(rms, least)))
    scale = np.where(rms >= least, _fit_scale(code, x, codes), 0).astype(np.float16)
    codes = find_codes(scale.astype(np.float32) * code.unit)
    return np.where(scale[..., None] != 0, codes, 0).astype(np.uint8), scale


def encode(x: np.ndarray, bits: int, residual: bool = False) -> Records:
    """x: [..., head_dim], not rotated."""
    rotated = rotate(finite(x))
    codes, scale = encode_rotated(polar(bits), rotated)
    records = Records(bits, codes, scale)
    if not residual:
        return records
    rest = np.where(scale[..., None] != 0, rotated - records.decode(), np.float32(0))
    step = (sum_of_lanes(np.abs(rest)) / np.float32(x.shape[-1])).astype(np.float16)
    return Records(bits, codes, scale, rest < 0, step)


# pages


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes in the order of the page, in chunks of 64."""
    chunks = codes.reshape(-1, 64)
    if bits == 4:
        return chunks.tobytes()
    low, high = chunks & 15, chunks >> 4
    parts = [low[:, :32] | low[:, 32:] << 4]
    if bits == 3:
        parts.append(high[:, :16] | high[:, 16:32] << 2 | high[:, 32:48] << 4 | high[:, 48:] << 6)
    return np.concatenate(parts, -1).tobytes()


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    chunks = packed.reshape(-1, 16 * bits)
    if bits == 4:
        return chunks.ravel()
    codes = np.concatenate([chunks[:, :32] & 15, chunks[:, :32] >> 4], -1)
    if bits == 3:
        codes |= np.concatenate([(chunks[:, 32:] >> shift & 3) << 4 for shift in (0, 2, 4, 6)], -1)
    return codes.ravel()


def in_quads(codes: np.ndarray) -> np.ndarray:
    """[n, m] with the n in fours, and within each four the m outermost: the order of V codes, of K codes transposed."""
    n, m = codes.shape
    return codes.reshape(n // 4, 4, m).transpose(0, 2, 1).ravel()


def from_quads(codes: np.ndarray, n: int) -> np.ndarray:
    return codes.reshape(n // 4, -1, 4).transpose(0, 2, 1).reshape(n, -1)


@dataclass(frozen=True)
class Codec:
    """struct monarch_codec."""

    head_dim: int
    page_size: int = 16
    bits_k: int = 4
    bits_v: int = 4
    residual_k: bool = False

    def sizes(self) -> list[int]:
        """Bytes of K codes, K residual, V codes, K scales, K steps, V scales."""
        n_values = self.page_size * self.head_dim
        residual = self.residual_k and self.bits_k != 16
        return [
            n_values * self.bits_k // 8,
            n_values // 8 * residual,
            n_values * self.bits_v // 8,
            2 * self.page_size * (self.bits_k != 16),
            2 * self.page_size * residual,
            2 * self.page_size * (self.bits_v != 16),
        ]

    def _parts(self, block: bytes) -> list[np.ndarray]:
        return np.split(np.frombuffer(block, np.uint8), np.cumsum(self.sizes())[:-1])

    def encode_page(self, k: np.ndarray, v: np.ndarray) -> bytes:
        """k, v: [page_size, head_dim], not rotated."""
        k_codes, k_residual, k_scales, k_steps = self._encode_k(k)
        v_codes, v_scales = self._encode_v(v)
        return b"".join([k_codes, k_residual, v_codes, k_scales, k_steps, v_scales])

    def _encode_k(self, k: np.ndarray) -> tuple[bytes, bytes, bytes, bytes]:
        if self.bits_k == 16:
            return _to_f16(k).tobytes(), b"", b"", b""
        records = encode(k, self.bits_k, self.residual_k)
        codes = pack_codes(in_quads(records.codes.T), self.bits_k)
        if records.step is None:
            return codes, b"", records.scale.tobytes(), b""
        residual = np.packbits(records.negative.T, axis=-1, bitorder="little")
        return codes, residual.tobytes(), records.scale.tobytes(), records.step.tobytes()

    def _encode_v(self, v: np.ndarray) -> tuple[bytes, bytes]:
        if self.bits_v == 16:
            return _to_f16(v).tobytes(), b""
        records = encode(v, self.bits_v)
        return pack_codes(in_quads(records.codes), self.bits_v), records.scale.tobytes()

    def decode_page_k(self, block: bytes) -> np.ndarray:
        codes, residual, _, scales, steps, _ = self._parts(block)
        if self.bits_k == 16:
            return codes.view(np.float16).reshape(self.page_size, -1).astype(np.float32)
        codes = from_quads(unpack_codes(codes, self.bits_k), self.head_dim // 2).T
        if not self.residual_k:
            return Records(self.bits_k, codes, scales.view(np.float16)).decode()
        negative = np.unpackbits(residual.reshape(self.head_dim, -1), axis=-1, bitorder="little").T
        return Records(self.bits_k, codes, scales.view(np.float16), negative, steps.view(np.float16)).decode()

    def decode_page_v(self, block: bytes) -> np.ndarray:
        _, _, codes, _, _, scales = self._parts(block)
        if self.bits_v == 16:
            return codes.view(np.float16).reshape(self.page_size, -1).astype(np.float32)
        codes = from_quads(unpack_codes(codes, self.bits_v), self.page_size)
        return Records(self.bits_v, codes, scales.view(np.float16)).decode()


# summaries


def _round_down_f16(x: np.float32) -> np.float16:
    h = x.astype(np.float16)
    return h if h.astype(np.float32) <= x else np.nextafter(h, np.float16(-np.inf))


def _quantize(x: np.ndarray, offset: np.float32, step: np.float32, rounding: Callable) -> np.ndarray:
    if step == 0:
        return np.zeros(x.shape, np.uint8)
    u = rounding((x - offset) / step)
    if rounding is np.floor:
        u -= offset + step * u > x
    if rounding is np.ceil:
        u += offset + step * u < x
    return u.clip(0, 255).astype(np.uint8)


def _encode_half(x: np.ndarray, rounding: Callable) -> tuple[bytes, bytes]:
    offset = _round_down_f16(x.min() + np.float32(0))
    start = offset.astype(np.float32)
    step = ((x.max() - start) / np.float32(255)).astype(np.float16)
    while start + np.float32(255) * step.astype(np.float32) < x.max():
        step = np.nextafter(step, np.float16(np.inf))
    codes = _quantize(x, start, step.astype(np.float32), rounding)
    return offset.tobytes() + step.tobytes(), codes.tobytes()


def _mean_std(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = np.float32(len(x))
    mean = np.zeros(x.shape[-1], np.float32)
    variance = np.zeros(x.shape[-1], np.float32)
    for row in x:
        mean += row
    mean /= n
    for row in x:
        variance += (row - mean) * (row - mean)
    return mean, np.sqrt(variance / n)


def _encode_scale(scale: np.float32) -> np.uint8:
    """5 bits of exponent from 2^-20, 3 of the mantissa; 0 is kept for a part without tokens."""
    code = ((int(scale.view(np.uint32)) + (1 << 19)) >> 20) - SCALE_CODE_BIAS
    return np.uint8(min(max(code, 1), 255))


def _unpack_parts(summary: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Scales [8], NaN of empty parts, and what they scale [8, head_dim]."""
    codes = np.frombuffer(summary[:8], np.uint8)
    scales = ((codes.astype(np.uint32) + SCALE_CODE_BIAS) << 20).view(np.float32)
    packed = np.frombuffer(summary[8:], np.uint8).reshape(2, -1, N_PARTS // 2).transpose(0, 2, 1)
    values = (packed[..., None] >> SHIFTS & 3).reshape(N_PARTS, -1).astype(np.float32) - np.float32(1.5)
    return np.where(codes == 0, np.float32(np.nan), scales), values


def _encode_part(x: np.ndarray) -> tuple[np.uint8, np.ndarray]:
    """Scale and 2-bit values [head_dim] of a part's tokens [n, head_dim]."""
    mean = np.zeros(x.shape[-1], np.float32)
    if len(x) == 0:
        return np.uint8(0), np.full(x.shape[-1], 2, np.uint8)
    for row in x:
        mean += row
    y = rotate(mean / np.float32(len(x)))
    total = sum_of_lanes(y * y)
    step = constants()["MONARCH_SUMMARY_STEP"][0] * np.sqrt(total / np.float32(len(y)))
    codes = np.clip(np.floor(y / step) + 2, 0, 3) if step > 0 else np.full(len(y), 2)
    product = sum_of_lanes(y * (codes.astype(np.float32) - np.float32(1.5)))
    return _encode_scale(total / product if product > 0 else np.float32(0)), codes.astype(np.uint8)


def _encode_parts(x: np.ndarray) -> bytes:
    borders = [i * len(x) // N_PARTS for i in range(N_PARTS + 1)]
    parts = [_encode_part(x[begin:end]) for begin, end in itertools.pairwise(borders)]
    # [which four parts, part of these, byte, dimension of the byte]
    codes = np.array([codes for _, codes in parts]).reshape(2, N_PARTS // 2, -1, 4)
    packed = (codes << SHIFTS).sum(-1, dtype=np.uint8).transpose(0, 2, 1)
    return bytes(scale for scale, _ in parts) + packed.tobytes()


def encode_summary(scorer: str, k: np.ndarray) -> bytes:
    """One page by itself: offsets and steps, or scales, then values. k: [n_tokens, head_dim], not rotated."""
    x = finite(k)
    if scorer == "parts":
        return _encode_parts(x)
    if scorer == "minmax":
        halves = [_encode_half(x.min(0), np.floor), _encode_half(x.max(0), np.ceil)]
    else:
        halves = [_encode_half(half, np.rint) for half in _mean_std(x)]
    return b"".join(head for head, _ in halves) + b"".join(codes for _, codes in halves)


def interleave_summaries(scorer: str, summaries: list[bytes]) -> bytes:
    """The pages of a group as one block."""
    pages = np.array([np.frombuffer(summary, np.uint8) for summary in summaries])
    heads = pages[:, :8].copy().view(np.uint8 if scorer == "parts" else np.float16).T
    quads = pages[:, 8:].reshape(len(pages), -1, 4).transpose(1, 0, 2)
    return heads.tobytes() + quads.tobytes()


def decode_summary(scorer: str, summary: bytes) -> np.ndarray:
    """[2, head_dim]: minima and maxima, or means and standard deviations; parts [8, head_dim], rotated, NaN if none."""
    if scorer == "parts":
        scales, values = _unpack_parts(summary)
        return scales[:, None] * values
    offset0, step0, offset1, step1 = np.frombuffer(summary[:8], np.float16).astype(np.float32)
    first, second = np.frombuffer(summary[8:], np.uint8).astype(np.float32).reshape(2, -1)
    return np.stack([offset0 + step0 * first, offset1 + step1 * second])


def summary_query(scorer: str, q: np.ndarray) -> np.ndarray:
    """The weights [2 head_dim] whose dot product with the summary is the score; parts use the first half."""
    x = finite(q)
    if scorer == "parts":
        return np.concatenate([rotate(x), np.zeros_like(x)])
    if scorer == "minmax":
        return np.concatenate([np.minimum(x, 0), np.maximum(x, 0)])
    return np.concatenate([x, constants()["MONARCH_MEANSTD_WEIGHT"][0] * np.abs(x)])


def summary_score(scorer: str, weights: np.ndarray, summary: bytes) -> np.float32:
    if scorer == "parts":
        scales, values = _unpack_parts(summary)
        return np.nanmax(scales * sum_of_lanes(weights[: len(weights) // 2] * values))
    first, second = sum_of_lanes(weights.reshape(2, -1) * decode_summary(scorer, summary))
    return first + second

