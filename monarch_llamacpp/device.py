"""The GPU that the loaded llama.cpp library sees."""

from __future__ import annotations

import ctypes

_GPU = 1  # enum ggml_backend_dev_type


def free_vram() -> int:
    """Of the first GPU, in bytes; 0 without one. Of whichever library llama_cpp has loaded."""
    import llama_cpp

    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ggml.ggml_backend_dev_by_type(_GPU)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if device:
        ggml.ggml_backend_dev_memory(ctypes.c_void_p(device), ctypes.byref(free), ctypes.byref(total))
    return free.value
