"""Builds emulated_device.cpp against a patched library: a device that runs the CUDA kernels in their emulation."""

import os
import subprocess
from pathlib import Path

from monarch_llamacpp import paths

EMULATION_FLAGS = (
    f"-I{Path(__file__).parent}",
    "-ffp-contract=off",  # as with nvcc: nothing is fused that the plain path does not fuse
    "-U_FORTIFY_SOURCE",  # longjmp from fibre to fibre is not what glibc's check expects
    "-DMONARCH_ALIGNED_LOADS",  # as on a device
    "-fno-strict-aliasing",
    "-Wno-unused-function",
)


def build_emulated_device(patched_bin: Path, folder: Path) -> Path:
    """Where EMULATED_DEVICE (devices.py) finds it."""
    source = patched_bin.parent / "src"
    out = folder / "libemulated_device.so"
    include = [f"-I{path}" for path in (paths.native_dir(), source / "ggml/include", source / "ggml/src")]
    link = [f"-L{patched_bin}", "-lggml", "-lggml-base", "-lggml-cpu"]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-shared", "-fPIC", *EMULATION_FLAGS, *include]
    subprocess.run([*command, str(Path(__file__).with_suffix(".cpp")), *link, "-o", str(out)], check=True)
    return out
