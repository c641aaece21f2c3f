"""What a build with the CUDA backend needs: nvcc, cuBLAS, CUB, and the architectures of the cards."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from .builder_recipe import Cuda
from .errors import MonarchError, UsageError

OLDEST = 75  # Turing: what native/'s kernels are compiled and tested for

_CAPABILITY = re.compile(r"^ *(\d+\.\d+) *$", re.MULTILINE)
_RELEASE = re.compile(r"release (\d+)\.(\d+)")
_ARCHITECTURE = re.compile(r"(\d+)[a-z]?(-real|-virtual)?")


@dataclasses.dataclass(frozen=True)
class _Nvcc:
    path: str
    version: str
    major: int

    @property
    def root(self) -> Path:
        """The toolkit's folder, also where PATH holds a script that calls the real nvcc."""
        result = _output([self.path, "--dryrun", "-x", "cu", "/dev/null"])
        top = re.search(r"^#\$ TOP=(.+)$", result, re.MULTILINE)
        return Path(top[1]).resolve() if top else Path(self.path).resolve().parent.parent


def find_cuda(asked: str | None) -> Cuda:
    """asked: architectures such as 75,86; those of the cards in this machine otherwise."""
    architectures = _parse_architectures(asked) if asked else None
    nvcc = _find_nvcc()
    options = {
        "GGML_CUDA": "ON",
        "GGML_CUDA_NCCL": "OFF",
        "CMAKE_CUDA_COMPILER": nvcc.path,
        "CMAKE_CUDA_ARCHITECTURES": architectures or _present_architectures(),
    }
    return Cuda(options["CMAKE_CUDA_ARCHITECTURES"], options | _library_options(nvcc), nvcc.version)


def _parse_architectures(text: str) -> str:
    names = re.split(r"[,; ]+", text.strip())
    for name in names:
        match = _ARCHITECTURE.fullmatch(name)
        if not match or int(match[1]) < OLDEST:
            raise UsageError(f"--cuda-arch {text}: {name!r} is no architecture of {OLDEST} or above; "
                             "write them like 75,86,90")
    return ";".join(names)


def _present_architectures() -> str:
    smi = shutil.which("nvidia-smi")
    found = _output([smi, "--query-gpu=compute_cap", "--format=csv,noheader"]) if smi else ""
    names = sorted({line.replace(".", "") for line in _CAPABILITY.findall(found)})
    if not names:
        raise MonarchError("no NVIDIA card in this machine (nvidia-smi names none): "
                           "say what to build for, as in --cuda-arch 75,86,90")
    if too_old := [name for name in names if int(name) < OLDEST]:
        raise MonarchError(f"a card in this machine is of architecture {too_old[0]}, the kernels need {OLDEST}: "
                           "name the others with --cuda-arch, or build without --cuda")
    return ";".join(names)


def _find_nvcc() -> _Nvcc:
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    search = os.pathsep.join(map(str, [*homes, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]))
    path = shutil.which(os.environ.get("CUDACXX") or "nvcc", path=search)
    if not path:
        raise MonarchError("nvcc is missing: install NVIDIA's CUDA toolkit, 12.0 or newer, and put its bin folder on "
                           "PATH, or build without --cuda")
    release = _RELEASE.search(text := _output([path, "--version"]))
    if not release or int(release[1]) < 12:
        raise MonarchError(f"{path} is {release[0] if release else 'no working nvcc'}: "
                           "install the CUDA toolkit 12.0 or newer, or build without --cuda")
    return _Nvcc(path, f"{path}: {text.strip().splitlines()[-1]}", int(release[1]))


def _library_options(nvcc: _Nvcc) -> dict[str, str]:
    """CMake looks in the toolkit; what comes from PyPI packages is named to it."""
    root = nvcc.root
    includes, runpath, options = [], ["$ORIGIN"], {}
    if not (root / "include" / "cublas_v2.h").is_file():
        header = _packaged("cublas_v2.h", nvcc, root)
        folder = header.parent.parent / "lib"
        names = ("cublas", "cublasLt")
        options = {f"CUDA_{name}_LIBRARY": str(_packaged_library(folder, name, nvcc)) for name in names}
        includes.append(header.parent)
        runpath.append(str(folder))
    if not any((root / "include" / part / "cub" / "cub.cuh").is_file() for part in (".", "cccl")):
        includes.append(_packaged("cub/cub.cuh", nvcc, root).parent.parent)
    if not _has_driver_library(root):
        options["GGML_CUDA_NO_VMM"] = "ON"  # virtual memory is the only thing that links the driver
    if includes:
        options["CMAKE_CUDA_FLAGS"] = " ".join(f'-I"{folder}"' for folder in includes)
    runpath.append(str(root / "lib64"))
    return options | {"CMAKE_INSTALL_RPATH": ";".join(runpath)}


def _packaged(name: str, nvcc: _Nvcc, root: Path) -> Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for pattern in (f"cu{nvcc.major}/include", "*/include"):  # since CUDA 13 all packages share one folder
            for part in (".", "cccl"):
                if found := next(Path(folder).glob(f"{pattern}/{part}/{name}"), None):
                    return found
    suffix = "-cu12" if nvcc.major == 12 else ""
    package = "nvidia-cublas" if name.startswith("cublas") else "nvidia-cuda-cccl"
    raise MonarchError(f"{name} is missing in {root / 'include'}: pip install {package}{suffix}, "
                       "or install all of the CUDA toolkit")


def _packaged_library(folder: Path, name: str, nvcc: _Nvcc) -> Path:
    library = folder / f"lib{name}.so.{nvcc.major}"
    if not library.is_file():
        raise MonarchError(f"{library} is missing: the package beside it is for another CUDA than nvcc's {nvcc.major}")
    return library


def _has_driver_library(root: Path) -> bool:
    stubs = [root / "lib64" / "stubs" / "libcuda.so", *root.glob("targets/*/lib/stubs/libcuda.so")]
    folders = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")
    return any(file.is_file() for file in [*stubs, *(Path(folder, "libcuda.so") for folder in folders)])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""
