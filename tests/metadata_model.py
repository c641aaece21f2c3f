"""A model of a file that holds metadata alone: llama.cpp asks for its tensors, which are random."""

import ctypes
import zlib
from typing import Any

import llama_cpp
import numpy as np

_LIB = llama_cpp.llama_cpp._lib
_POINTER = ctypes.c_void_p
_SetData = ctypes.CFUNCTYPE(None, _POINTER, _POINTER)


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", _POINTER)]


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    found = getattr(_LIB, name)
    found.restype, found.argtypes = restype, argtypes
    return found


_read_metadata = _function("gguf_init_from_file", _POINTER, ctypes.c_char_p, _GgufInitParams)
_free_metadata = _function("gguf_free", None, _POINTER)
_get_name = _function("ggml_get_name", ctypes.c_char_p, _POINTER)
_n_elements = _function("ggml_nelements", ctypes.c_int64, _POINTER)
_n_rows = _function("ggml_nrows", ctypes.c_int64, _POINTER)
_n_bytes = _function("ggml_nbytes", ctypes.c_size_t, _POINTER)
_set = _function("ggml_backend_tensor_set", None, _POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t)
_init = _function("llama_model_init_from_user", _POINTER, _POINTER, _SetData, _POINTER, llama_cpp.llama_model_params)


def _values(name: str, shape: tuple[int, int]) -> np.ndarray:
    """Attention that is neither flat nor a single spike, so that errors in K and V show."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * normal
    if name.endswith(".bias"):
        return 0.1 * normal
    return normal if name == "token_embd.weight" else normal * shape[1] ** -0.5


@_SetData
def _set_data(tensor: int, _userdata: object) -> None:
    n_rows = _n_rows(tensor)
    data = _values(_get_name(tensor).decode(), (n_rows, _n_elements(tensor) // n_rows)).astype(np.float32)
    assert data.nbytes == _n_bytes(tensor)
    _set(tensor, data.ctypes.data, 0, data.nbytes)


def init_model(metadata: str, params: llama_cpp.llama_model_params) -> int | None:
    gguf = _read_metadata(metadata.encode(), _GgufInitParams(True, None))
    model = _init(gguf, _set_data, None, params)
    _free_metadata(gguf)
    return model
