import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_codec import BUILDS, native_codec

from monarch_llamacpp import codec
from monarch_llamacpp.codec import Codec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import train_codec_rings  # noqa: E402

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
ODD_VALUES = np.array([0, -0.0, 1e-30, 3e-8, 6e-8, 6e4, 65504, 65520, 3e38, np.inf, -np.inf, np.nan], np.float32)

codecs = st.builds(
    Codec,
    head_dim=st.sampled_from([16, *HEAD_DIMS, 240]),
    page_size=st.sampled_from([8, 16, 32]),
    bits_k=st.sampled_from([2, 3, 4, 4, 16]),
    bits_v=st.sampled_from([2, 3, 4, 4, 16]),
    residual_k=st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)
builds = st.sampled_from(list(BUILDS))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def odd_pages(seed: int, c: Codec) -> np.ndarray:
    """K and V with records of every size and some values that nobody should send."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-10, 6, (2, c.page_size, 1))
    x = (gaussian(seed, 2, c.page_size, c.head_dim) * size).astype(np.float32)
    return np.where(rng.random(x.shape) < rng.choice([0, 0.02, 0.5]), rng.choice(ODD_VALUES, x.shape), x)


def nmse(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x - y).astype(np.float64) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def record_nmse(x: np.ndarray, bits: int, residual: bool = False) -> float:
    return nmse(x, codec.unrotate(codec.encode(x, bits, residual).decode()))


# C and numpy


@settings(max_examples=150, deadline=None)
@given(c=codecs, seed=seeds, build=builds)
def test_c_and_numpy_agree_to_the_byte(c, seed, build):
    native = native_codec(build)
    k, v = odd_pages(seed, c)
    block = c.encode_page(k, v)
    assert native.encode_page(c, k, v) == block

    native_k, native_v = native.decode_page(c, block)
    np.testing.assert_array_equal(native_k, c.decode_page_k(block))
    np.testing.assert_array_equal(native_v, c.decode_page_v(block))
    assert np.isfinite(native_k).all() and np.isfinite(native_v).all()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_the_same_in_c_and_turns_back(build, head_dim):
    native = native_codec(build)
    x = gaussian(head_dim, 20, head_dim)
    np.testing.assert_array_equal(native.rotate(x), codec.rotate(x))
    np.testing.assert_array_equal(native.unrotate(x), codec.unrotate(x))
    np.testing.assert_allclose(codec.unrotate(codec.rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_keeps_lengths_and_spreads_every_coordinate(head_dim):
    rotated = codec.rotate(np.eye(head_dim, dtype=np.float32))
    np.testing.assert_allclose(rotated @ rotated.T, np.eye(head_dim), atol=1e-6)
    assert np.abs(rotated).max() < 3 / np.sqrt(head_dim)


@pytest.mark.parametrize("build", BUILDS)
def test_f16_rounds_as_ieee_says(build):
    native, c = native_codec(build), Codec(256, 32, 16, 16)
    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    middle = (every[:-1] + every[1:]) / 2  # ties, and their neighbours
    values = np.concatenate([every, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    values = np.concatenate([values, gaussian(1, 100_000) * 1e-6])
    values.resize(-(-len(values) // (2 * 32 * 256)), 2, 32, 256)
    for k, v in values:
        block = native.encode_page(c, k, v)
        assert block == k.astype(np.float16).tobytes() + v.astype(np.float16).tobytes()
        np.testing.assert_array_equal(native.decode_page(c, block)[0], k.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("build", BUILDS)
def test_f16_is_read_as_ieee_says(build):
    """All of it: the emulated CUDA kernels read rings and masks so, in which there are infinities and NaN."""
    native, c = native_codec(build), Codec(256, 32, 16, 16)
    for every in np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 2, 32, 256):
        got = native.decode_page(c, every.tobytes())
        np.testing.assert_array_equal(np.stack(got), every.astype(np.float32))


# bytes


@pytest.mark.parametrize(
    ("head_dim", "bits", "residual", "size"),
    [(64, 4, 0, 34), (64, 3, 0, 26), (64, 2, 0, 18), (64, 4, 1, 44), (128, 4, 0, 66), (80, 4, 0, 42), (64, 16, 1, 128)],
)
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_a_record_is_as_wide_as_stated(head_dim, bits, residual, size, page_size):
    c = Codec(head_dim, page_size, bits, 16, bool(residual))
    k, v = gaussian(1, 2, page_size, head_dim)
    block = native_codec("native").encode_page(c, k, v)  # checks that C writes no byte more
    assert len(block) == page_size * (size + 2 * head_dim)
    assert block == c.encode_page(k, v)  # nor less


def unpacked(chunk: np.ndarray, bits: int) -> list[int]:
    """64 codes, one by one, as the header words it."""
    if bits == 4:
        return chunk.tolist()
    codes = [int(chunk[j % 32]) >> 4 * (j // 32) & 15 for j in range(64)]
    if bits == 3:
        codes = [code | (int(chunk[32 + j % 16]) >> 2 * (j // 16) & 3) << 4 for j, code in enumerate(codes)]
    return codes


@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 8), (64, 16), (80, 16), (256, 32)])
def test_codes_lie_in_quads_of_pairs_and_of_tokens(head_dim, page_size, bits):
    c = Codec(head_dim, page_size, bits, bits)
    k, v = gaussian(2, 2, page_size, head_dim)
    block = np.frombuffer(native_codec("native").encode_page(c, k, v), np.uint8)
    size, n_pairs = page_size * head_dim * bits // 8, head_dim // 2

    parts = block[:size], block[size : 2 * size]
    flat_k, flat_v = (sum((unpacked(x, bits) for x in part.reshape(-1, 16 * bits)), []) for part in parts)
    codes_k, codes_v = codec.encode(k, bits).codes, codec.encode(v, bits).codes
    for t in range(page_size):
        for p in range(n_pairs):
            assert flat_k[p // 4 * page_size * 4 + t * 4 + p % 4] == codes_k[t, p]
            assert flat_v[t // 4 * n_pairs * 4 + p * 4 + t % 4] == codes_v[t, p]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bits", codec.BITS)
def test_points_are_the_polar_ones_in_units(bits, build):
    code, points = codec.polar(bits), native_codec(build).points(bits)
    n_codes = 1 << 2 * bits
    np.testing.assert_array_equal(points[:, :n_codes], code.point_table)
    assert (points[:, n_codes:] == 0).all()
    assert np.abs(points.astype(int)).max() == 127

    codes = np.arange(n_codes)
    direction = codes & ((2 << bits) - 1)
    exact = code.radius[codes >> bits] * [code.cosine[direction], code.sine[direction]] * code.unit
    assert np.abs(code.point_table - exact).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("bits", codec.BITS)
def test_a_record_decodes_to_its_scale_times_the_points_of_its_codes(bits):
    c = Codec(64, 16, bits, bits)
    k, v = gaussian(9, 2, 16, 64)
    native = native_codec("native")
    for x, y in zip((k, v), native.decode_page(c, native.encode_page(c, k, v)), strict=True):
        records = codec.encode(x, bits)
        px, py = native.points(bits)[:, records.codes].astype(np.float32)
        np.testing.assert_array_equal(y / records.scale.astype(np.float32)[:, None], np.hstack([px, py]))


def test_the_units_are_those_of_the_rings():
    for bits in codec.BITS:
        code = codec.polar(bits)
        assert train_codec_rings.with_rings(bits, code.radius).unit == pytest.approx(code.unit, rel=1e-6)


def test_the_least_rms_is_one_whose_scale_is_zero():
    nearest = min(np.hypot(*codec.polar(bits).point_table.astype(float)).min() for bits in codec.BITS)
    # sum(x*p)/sum(p*p) is at most |x|/|p|
    assert codec.constants()["MONARCH_LEAST_RMS"][0] * np.sqrt(2) / nearest < 2**-25


def test_the_low_bits_of_a_code_index_the_tables():
    for bits in codec.BITS:
        code = codec.polar(bits)
        step = 2 * np.pi / (1 << bits)
        angle = np.concatenate([np.arange(1 << bits), np.arange(1 << bits) + 0.5]) * step
        np.testing.assert_allclose(code.cosine, np.cos(angle), atol=1e-7)
        np.testing.assert_allclose(code.sine, np.sin(angle), atol=1e-7)
        assert (np.diff(code.radius) > 0).all() and len(code.radius) == 1 << bits


# errors


def test_gaussian_records_stay_within_the_bounds():
    assert record_nmse(gaussian(3, 3000, 64), 4) <= 0.0070
    assert record_nmse(gaussian(3, 1500, 128), 4) <= 0.0074


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("where", [0, 3, -1])
def test_one_huge_coordinate_does_no_harm(head_dim, where):
    x = gaussian(4, 100_000 // head_dim, head_dim)
    x[:, where] = 30
    assert record_nmse(x, 4) <= 0.0085


def test_rotation_is_what_tames_a_huge_coordinate():
    x = gaussian(4, 1000, 64)
    x[:, 3] = 30
    codes, scale = codec.encode_rotated(codec.polar(4), x)
    assert nmse(x, codec.Records(4, codes, scale).decode()) > 0.03


def test_the_errors_are_those_that_the_docs_state():
    text = (ROOT / "docs" / "codec.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) ((?:\| 0\.\d+ ){5})\|$", text, re.MULTILINE)
    assert [int(head_dim) for head_dim, _ in rows] == list(HEAD_DIMS)
    for head_dim, stated in rows:
        x = gaussian(5, 100_000 // int(head_dim), int(head_dim))
        measured = train_codec_rings.errors(x)
        rounding = 5e-5
        np.testing.assert_allclose(
            measured, [float(e) for e in stated.split("|")[1:]], 0.02, rounding, err_msg=head_dim
        )


@pytest.mark.parametrize("bits", codec.BITS)
def test_the_rings_in_use_are_trained(bits):
    code = codec.polar(bits)
    records = [codec.rotate(gaussian(6, 200_000 // d, d)) for d in (64, 128)]
    moved = train_codec_rings.move_rings(code, records)
    np.testing.assert_allclose(moved[:-2], code.radius[:-2], rtol=0.01)
    np.testing.assert_allclose(moved, code.radius, rtol=0.05)  # few pairs reach the last ones


@settings(max_examples=60, deadline=None)
@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    bits=st.sampled_from(codec.BITS),
    size=st.floats(1e-3, 1e3),
    seed=seeds,
    build=builds,
)
def test_encoding_what_was_decoded_changes_nothing(head_dim, bits, size, seed, build):
    native, c = native_codec(build), Codec(head_dim, 32, bits, bits)
    k, v = gaussian(seed, 2, 32, head_dim) * np.float32(size)
    block = native.encode_page(c, k, v)
    k, v = (native.unrotate(x) for x in native.decode_page(c, block))
    assert native.encode_page(c, k, v) == block


# odd input: docs/codec.md


def decoded(x: np.ndarray, bits: int, residual: bool = False) -> np.ndarray:
    """One record, through C."""
    native, c = native_codec("native"), Codec(len(x), 8, bits, bits, residual)
    page = np.tile(x.astype(np.float32), (8, 1))
    k, v = native.decode_page(c, native.encode_page(c, page, page))
    assert residual or (k == v).all()
    return native.unrotate(k)[0]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-30, 1e-38, np.nan])
def test_nothing_decodes_to_nothing(value, bits, residual):
    assert (decoded(np.full(64, value), bits, residual) == 0).all()
    assert (decoded(np.full(80, value), bits, residual) == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 16])
def test_nan_counts_as_zero(bits):
    x = gaussian(7, 64)
    x[5] = np.nan
    np.testing.assert_array_equal(decoded(x, bits), decoded(np.nan_to_num(x), bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 16])
def test_infinity_counts_as_the_greatest_f16(bits):
    x = gaussian(8, 64)
    x[[5, 9]] = np.inf, -np.inf
    y = x.clip(-65504, 65504)
    np.testing.assert_array_equal(decoded(x, bits), decoded(y, bits))


@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize("value", [6e4, -6e4, 65504, np.inf])
def test_huge_values_are_as_exact_as_others(value, bits):
    x = np.full(64, value)
    y = decoded(x, bits)
    assert np.isfinite(y).all()
    ones = np.sign(x)
    assert nmse(x.clip(-65504, 65504), y) == pytest.approx(nmse(ones, decoded(ones, bits)), rel=0.02)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_constant_record_is_a_record_like_others(head_dim):
    assert nmse(np.ones(head_dim), decoded(np.ones(head_dim), 4)) < 0.0085


@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_scale_fits_f16_wherever_the_energy_lies(head_dim, bits):
    # all the energy of the rotated record in one coordinate, then in all alike
    one = np.sign(codec.unrotate(np.eye(head_dim, dtype=np.float32)))
    for x in (one, np.ones_like(one)):
        records = codec.encode(x * np.float32(65504), bits)
        assert (records.scale < np.float16(16384)).all() and (records.scale > 0).all()
        assert np.isfinite(records.decode()).all()
