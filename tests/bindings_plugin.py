"""Loaded into pytest for llama-cpp-python's own tests: no download, and the model of BINDINGS_MODEL instead of one."""

import os
import sys
from types import ModuleType

import huggingface_hub
import pytest

TRANSFORMER = "tinyllamas/stories15M-q4_0.gguf"


def find_local(repo_id: str, filename: str) -> str:
    if filename != TRANSFORMER:
        pytest.skip(f"asserts what {repo_id} says, which would be a download")
    return os.environ["BINDINGS_MODEL"]


huggingface_hub.hf_hub_download = find_local

# they import one name of it and use it nowhere
special = ModuleType("scipy.special")
special.log_softmax = None
sys.modules |= {"scipy": ModuleType("scipy"), "scipy.special": special}
