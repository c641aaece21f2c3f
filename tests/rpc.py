"""ggml-rpc of the library that LLAMA_CPP_LIB_PATH names, for child processes."""

import ctypes
import os


def load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml-rpc, and the registry of backends."""
    folder = os.environ["LLAMA_CPP_LIB_PATH"]
    rpc, registry = (ctypes.CDLL(os.path.join(folder, name)) for name in ("libggml-rpc.so", "libggml.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    return rpc, registry
