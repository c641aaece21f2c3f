"""Devices for child processes: what the environment names is added to the library that LLAMA_CPP_LIB_PATH names."""

import ctypes
import os


def load_rpc() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml-rpc, and the registry of backends."""
    folder = os.environ["LLAMA_CPP_LIB_PATH"]
    rpc, registry = (ctypes.CDLL(os.path.join(folder, name)) for name in ("libggml-rpc.so", "libggml.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    return rpc, registry


def register() -> None:
    """RPC_ENDPOINT: a server of the same library. EMULATED_DEVICE: emulated_device.cpp, built."""
    if endpoint := os.environ.get("RPC_ENDPOINT"):
        rpc, registry = load_rpc()
        registry.ggml_backend_register(ctypes.c_void_p(rpc.ggml_backend_rpc_add_server(endpoint.encode())))
    if library := os.environ.get("EMULATED_DEVICE"):
        ctypes.CDLL(library).emulated_device_register()
