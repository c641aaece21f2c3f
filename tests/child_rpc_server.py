"""Serves this machine's CPU over RPC until it is killed, on LLAMA_CPP_LIB_PATH's library. Argument: endpoint."""

import ctypes
import sys

from devices import load_rpc


def main() -> None:
    rpc, registry = load_rpc()
    devices = (ctypes.c_void_p * 1)(registry.ggml_backend_dev_by_name(b"CPU"))
    size = ctypes.c_size_t
    rpc.ggml_backend_rpc_start_server(sys.argv[1].encode(), None, size(2), size(1), devices)


if __name__ == "__main__":
    main()
