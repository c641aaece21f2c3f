"""native/monarch-codec.cpp and monarch-summary.cpp alone, built with the system compiler and called through ctypes."""

import ctypes
import os
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from monarch_llamacpp.codec import Codec, constants
from monarch_llamacpp.paths import native_dir

# the second build has no F16C on x86-64: its conversions are the plain ones
BUILDS = {"native": ["-march=native"], "plain": []}
SCORERS = ("minmax", "meanstd", "parts")
SUMMARY_GROUP = int(constants()["MONARCH_SUMMARY_GROUP"][0])

_folder = tempfile.TemporaryDirectory(prefix="monarch-codec-")


class _Codec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("head_dim", "page_size", "bits_k", "bits_v", "residual_k")]


def _pointer(x: np.ndarray) -> ctypes.c_void_p:
    assert x.flags.c_contiguous
    return x.ctypes.data_as(ctypes.c_void_p)


def _struct(codec: Codec) -> _Codec:
    return _Codec(codec.head_dim, codec.page_size, codec.bits_k, codec.bits_v, codec.residual_k)


class NativeCodec:
    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.monarch_summary_score.restype = ctypes.c_float
        self.lib.monarch_codec_get_points.restype = ctypes.POINTER(ctypes.c_int8 * 512)

    def points(self, bits: int) -> np.ndarray:
        """x and y of every code: [2, 256]."""
        pointer = self.lib.monarch_codec_get_points(bits)
        assert ctypes.addressof(pointer.contents) % 64 == 0
        return np.frombuffer(pointer.contents, np.int8).reshape(2, 256)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        return self._rotated(self.lib.monarch_codec_rotate, x)

    def unrotate(self, x: np.ndarray) -> np.ndarray:
        return self._rotated(self.lib.monarch_codec_unrotate, x)

    def _rotated(self, function, x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)
        for row in x:
            function(len(row), _pointer(row))
        return x

    def encode_page(self, codec: Codec, k: np.ndarray, v: np.ndarray) -> bytes:
        size = sum(codec.sizes())
        block = np.full(size + 64, 0xA5, np.uint8)
        k, v = (np.ascontiguousarray(x, np.float32) for x in (k, v))
        self.lib.monarch_codec_encode_page(ctypes.byref(_struct(codec)), _pointer(k), _pointer(v), _pointer(block))
        assert (block[size:] == 0xA5).all(), "written past the end of the block"
        return block[:size].tobytes()

    def decode_page(self, codec: Codec, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        src = np.frombuffer(block, np.uint8)
        k, v = np.full((2, codec.page_size, codec.head_dim), np.nan, np.float32)
        self.lib.monarch_codec_decode_page_k(ctypes.byref(_struct(codec)), _pointer(src), _pointer(k))
        self.lib.monarch_codec_decode_page_v(ctypes.byref(_struct(codec)), _pointer(src), _pointer(v))
        return k, v

    def encode_summary(self, scorer: str, k: np.ndarray, group: np.ndarray, i_page: int) -> None:
        k = np.ascontiguousarray(k, np.float32)
        n_tokens, head_dim = k.shape
        assert len(group) == SUMMARY_GROUP * (8 + 2 * head_dim)
        self.lib.monarch_summary_encode(SCORERS.index(scorer), head_dim, n_tokens, _pointer(k), _pointer(group), i_page)

    def summary_query(self, scorer: str, q: np.ndarray) -> np.ndarray:
        q = np.ascontiguousarray(q, np.float32)
        weights = np.zeros(2 * len(q), np.float32)
        self.lib.monarch_summary_query(SCORERS.index(scorer), len(q), _pointer(q), _pointer(weights))
        return weights

    def summary_score(self, scorer: str, weights: np.ndarray, group: np.ndarray, i_page: int) -> float:
        head_dim = len(weights) // 2
        return self.lib.monarch_summary_score(
            SCORERS.index(scorer), head_dim, _pointer(weights), _pointer(group), i_page
        )


@lru_cache
def native_codec(build: str) -> NativeCodec:
    library = Path(_folder.name) / f"{build}.so"
    sources = [str(native_dir() / name) for name in ("monarch-codec.cpp", "monarch-summary.cpp")]
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", *BUILDS[build]]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", str(library)], check=True)
    return NativeCodec(library)
