import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_codec import BUILDS, SCORERS, SUMMARY_GROUP, NativeCodec, native_codec
from test_codec import HEAD_DIMS, ODD_VALUES, gaussian

from monarch_llamacpp import codec

seeds = st.integers(0, 2**32 - 1)
head_dims = st.sampled_from(HEAD_DIMS)
token_counts = st.integers(1, 32)
page_indices = st.integers(0, SUMMARY_GROUP - 1)


def keys(seed: int, n_tokens: int, head_dim: int, odd_share: float = 0.0) -> np.ndarray:
    """Keys whose dimensions differ in size and offset, as real ones do."""
    rng = np.random.default_rng(seed)
    size, offset = 10.0 ** rng.uniform(-4, 3, 2)
    x = gaussian(seed, n_tokens, head_dim) * rng.gamma(0.5, size, head_dim) + rng.normal(0, offset, head_dim)
    return np.where(rng.random(x.shape) < odd_share, rng.choice(ODD_VALUES, x.shape), x).astype(np.float32)


def group_of(native: NativeCodec, scorer: str, k: np.ndarray, i_page: int = 0) -> np.ndarray:
    """A group with one page written."""
    group = np.full(SUMMARY_GROUP * (8 + 2 * k.shape[1]), 0xA5, np.uint8)
    native.encode_summary(scorer, k, group, i_page)
    return group


def query(seed: int, head_dim: int) -> np.ndarray:
    return gaussian(seed ^ 1, head_dim)


@settings(max_examples=200, deadline=None)
@given(
    scorer=st.sampled_from(SCORERS),
    seed=seeds,
    n_tokens=token_counts,
    head_dim=head_dims,
    odd_share=st.sampled_from([0, 0.1]),
    build=st.sampled_from(list(BUILDS)),
    i_page=page_indices,
)
def test_c_and_numpy_agree_to_the_byte(scorer, seed, n_tokens, head_dim, odd_share, build, i_page):
    native = native_codec(build)
    k, q = keys(seed, n_tokens, head_dim, odd_share), query(seed, head_dim)
    summary = codec.encode_summary(scorer, k)
    assert len(summary) == 8 + 2 * head_dim
    others = bytes([0xA5]) * len(summary)
    pages = [others] * i_page + [summary] + [others] * (SUMMARY_GROUP - 1 - i_page)
    group = group_of(native, scorer, k, i_page)
    assert group.tobytes() == codec.interleave_summaries(scorer, pages)

    weights = codec.summary_query(scorer, q)
    np.testing.assert_array_equal(native.summary_query(scorer, q), weights)
    assert native.summary_score(scorer, weights, group, i_page) == codec.summary_score(scorer, weights, summary)


def test_sixteen_pages_lie_side_by_side():
    head_dim, native = 64, native_codec("native")
    group = np.zeros(16 * (8 + 2 * head_dim), np.uint8)
    pages = [keys(i, 16, head_dim) for i in range(16)]
    for i, k in enumerate(pages):
        native.encode_summary("minmax", k, group, i)
    for i, k in enumerate(pages):
        summary = np.frombuffer(codec.encode_summary("minmax", k), np.uint8)
        np.testing.assert_array_equal(group[:128].view(np.float16)[i::16], summary[:8].view(np.float16))
        for j, value in enumerate(summary[8:]):
            assert group[128 + (j // 4 * 16 + i) * 4 + j % 4] == value


@settings(max_examples=200, deadline=None)
@given(seed=seeds, n_tokens=token_counts, head_dim=head_dims, odd_share=st.sampled_from([0, 0.1]))
def test_minmax_bounds_every_value_and_every_logit(seed, n_tokens, head_dim, odd_share):
    k, q = codec.finite(keys(seed, n_tokens, head_dim, odd_share)), query(seed, head_dim)
    summary = codec.encode_summary("minmax", k)
    low, high = codec.decode_summary("minmax", summary)
    assert (low <= k.min(0)).all() and (high >= k.max(0)).all()

    weights = codec.summary_query("minmax", q)
    native = native_codec("native")
    score = native.summary_score("minmax", weights, group_of(native, "minmax", k), 0)
    rounding = 1e-6 * float(np.abs(weights) @ np.abs([low, high]).ravel())
    assert score >= (k.astype(np.float64) @ q.astype(np.float64)).max() - rounding


@settings(max_examples=100, deadline=None)
@given(scorer=st.sampled_from(["minmax", "meanstd"]), seed=seeds, n_tokens=token_counts, head_dim=head_dims)
def test_a_stored_statistic_is_within_one_step(scorer, seed, n_tokens, head_dim):
    k = keys(seed, n_tokens, head_dim).astype(np.float64)
    exact = [k.min(0), k.max(0)] if scorer == "minmax" else [k.mean(0), k.std(0)]
    for value, stored in zip(exact, codec.decode_summary(scorer, codec.encode_summary(scorer, k)), strict=True):
        step = np.ptp(value) / 255 + 2**-24  # f16 offset and step widen the range a little
        step += np.abs(value).max() * 2**-10 / 255
        steps = 1 if scorer == "minmax" else 0.5
        assert np.abs(stored - value).max() <= 1.01 * steps * step + 1e-6 * np.abs(k).max()


def test_scores_are_what_they_are_called():
    k, q = keys(1, 16, 64), query(1, 64)
    low, high = codec.decode_summary("minmax", codec.encode_summary("minmax", k))
    score = codec.summary_score("minmax", codec.summary_query("minmax", q), codec.encode_summary("minmax", k))
    assert score == pytest.approx(np.maximum(q * low, q * high).sum(), rel=1e-5)

    mean, std = codec.decode_summary("meanstd", codec.encode_summary("meanstd", k))
    score = codec.summary_score("meanstd", codec.summary_query("meanstd", q), codec.encode_summary("meanstd", k))
    weight = codec.constants()["MONARCH_MEANSTD_WEIGHT"][0]
    assert score == pytest.approx(q @ mean + weight * (np.abs(q) @ std), rel=1e-5)


def means_of_parts(k: np.ndarray) -> list[np.ndarray]:
    borders = [i * len(k) // codec.N_PARTS for i in range(codec.N_PARTS + 1)]
    return [k[a:b].mean(0, dtype=np.float64) if b > a else None for a, b in itertools.pairwise(borders)]


@settings(max_examples=100, deadline=None)
@given(seed=seeds, n_tokens=token_counts, head_dim=head_dims)
def test_a_part_keeps_its_product_with_itself(seed, n_tokens, head_dim):
    """But for the scale's three bits; a part without tokens counts for nothing."""
    k = codec.finite(keys(seed, n_tokens, head_dim) / 50)
    parts = codec.decode_summary("parts", codec.encode_summary("parts", k))
    for mean, stored in zip(means_of_parts(k), parts, strict=True):
        if mean is None:
            assert np.isnan(stored).all()
        elif (size := float(mean @ mean)) > head_dim * 1e-8:
            assert float(codec.rotate(mean.astype(np.float32)) @ stored) == pytest.approx(size, rel=2**-4 + 1e-3)


def test_a_part_is_near_its_mean():
    """2 bits of a Gaussian lose 12 % of its power; keeping the product makes it a little more."""
    k = gaussian(5, 16, 64)
    stored = codec.decode_summary("parts", codec.encode_summary("parts", k))
    mean = codec.rotate(np.array(means_of_parts(k), np.float32))
    assert np.square(stored - mean).sum() / np.square(mean).sum() < 0.17


def test_one_key_in_a_page_shows():
    """That of its pair's mean, where the page's own mean tells nothing."""
    found = 0
    for seed in range(50):
        pages = [gaussian(100 * seed + i, 16, 64) for i in range(64)]
        q = pages[17][5] * 2
        weights = codec.summary_query("parts", q)
        scores = [codec.summary_score("parts", weights, codec.encode_summary("parts", k)) for k in pages]
        found += int(np.argmax(scores)) == 17
    assert found >= 48


@pytest.mark.parametrize("scorer", ["minmax", "meanstd"])
def test_equal_keys_score_as_one(scorer):
    k = np.tile(gaussian(2, 1, 64), (16, 1))
    q = query(2, 64)
    score = codec.summary_score(scorer, codec.summary_query(scorer, q), codec.encode_summary(scorer, k))
    assert score == pytest.approx(float(k[0] @ q), abs=0.02 * float(np.abs(k[0]) @ np.abs(q)))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_odd_values_leave_scores_finite(scorer, value):
    native = native_codec("native")
    k, q = gaussian(3, 16, 64), query(3, 64)
    k[4, 7] = q[9] = value
    k[5] = value
    group = group_of(native, scorer, k)
    assert np.isfinite(native.summary_score(scorer, native.summary_query(scorer, q), group, 0))
    np.testing.assert_array_equal(group, group_of(native, scorer, codec.finite(k)))
