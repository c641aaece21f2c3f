"""chat on whatever library LLAMA_CPP_LIB_PATH names, behind a stand-in shim that reports a made-up page table."""

from __future__ import annotations

import sys
from types import ModuleType

from child_chat_shim import FakeLibrary

from monarch_llamacpp.cli import run_command


def fake_library() -> FakeLibrary:
    library = FakeLibrary()
    library.stats = {
        "n_layer": 2, "n_head_kv": 1, "mode": 2, "n_tokens": 116, "n_hot": 52, "n_cold": 64, "n_pages": 4,
        "n_promoted": 3, "hot_bytes": 1 << 20, "cold_bytes": 1 << 19,
    }  # fmt: skip
    library.pages = [(16, 16, 0, 0), (32, 16, 2, 0), (48, 16, 1, 1), (64, 16, 0, 0)]
    return library


if __name__ == "__main__":
    module = ModuleType("monarch_llamacpp.library")
    module.load = fake_library  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    sys.exit(run_command("chat", sys.argv[1:]))
