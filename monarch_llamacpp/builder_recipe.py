"""What a build is made of, and the digests that tell whether one on disk is the one wanted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from . import builder_source, paths
from .cpuinfo import cpu_features
from .hashes import hash_file, hash_value
from .pin import Pin

ARMS = ("stock", "patched")
SANITIZERS = ("address", "thread")  # arms too: the patched sources, instrumented, for tests
LIBRARY = "llama"
TOOLS = ("llama-bench", "llama-perplexity", "llama-quantize")

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",  # layers on other machines; in tests, a device whose memory the host cannot reach
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    # the result is a folder that can be copied: its libraries and tools find each other
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    # llama.cpp would otherwise ask git, and report the commit of whatever repository surrounds the cache
    "GIT_EXE": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
}

# -DNDEBUG as users have it: upstream asserts that no number is NaN
_INSTRUMENTED = {
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "GGML_NATIVE": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
}

_SANITIZER_OPTIONS = {
    "address": _INSTRUMENTED | dict.fromkeys(
        ("LLAMA_SANITIZE_ADDRESS", "LLAMA_SANITIZE_UNDEFINED", "GGML_SANITIZE_ADDRESS", "GGML_SANITIZE_UNDEFINED"), "ON"
    ),
    # the thread sanitizer does not see how OpenMP's own threads wait for each other
    "thread": _INSTRUMENTED | {
        "LLAMA_SANITIZE_THREAD": "ON", "GGML_SANITIZE_THREAD": "ON", "GGML_OPENMP": "OFF",
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cuda:
    """The CUDA backend of a build: builder_cuda finds it."""

    architectures: str  # as CMake writes them; empty: no CUDA
    options: dict[str, str]  # CMake's
    identity: str  # of the compiler


NO_CUDA = Cuda("", {}, "")


def cmake_options(arm: str, pin: Pin, cuda: Cuda = NO_CUDA) -> dict[str, str]:
    commit = pin.llama_cpp_commit[:9] + ("" if arm == "stock" else "-monarch")
    return _OPTIONS | {"LLAMA_BUILD_COMMIT": commit} | _SANITIZER_OPTIONS.get(arm, {}) | cuda.options


def files_digest(files: Mapping[str, Path]) -> str:
    return hash_value({name: hash_file(file) for name, file in files.items()})


def sources_digest(arm: str) -> str:
    """Of everything that the project adds to upstream."""
    if arm == "stock":
        return ""
    folders = {"patches": paths.patches_dir(), "native": paths.native_dir()}
    return hash_value({name: files_digest(builder_source.own_files(folder)) for name, folder in folders.items()})


def tree_key(arm: str, pin: Pin, compiler: str, cuda: Cuda = NO_CUDA) -> str:
    """Names the build tree. The sources are left out: after an edit the same tree is brought up to date."""
    return hash_value([arm, pin.sha256, cmake_options(arm, pin, cuda), cpu_features(), compiler + cuda.identity])[:12]


def build_digest(arm: str, pin: Pin, cuda: str = "") -> str:
    """Names the contents. Compilers are left out: using a library needs none. cuda: its architectures."""
    backends = [cuda] if cuda else []
    return hash_value([arm, pin.sha256, cmake_options(arm, pin), cpu_features(), sources_digest(arm), *backends])
