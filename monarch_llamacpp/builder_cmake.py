"""Runs cmake and ninja, and installs what they built."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from .builder_recipe import NO_CUDA, Cuda
from .errors import MonarchError
from .progress import Progress

# variables that change what the compiler is asked to do
_FLAG_VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
_NINJA_COUNT = re.compile(r"\[(\d+)/(\d+)\]")
_TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class Toolchain:
    cmake: str
    ninja: str
    identity: str  # compilers, their versions, flags from the environment
    cuda: Cuda = NO_CUDA


def find_toolchain(cuda: Cuda = NO_CUDA) -> Toolchain:
    cc = find_compiler("CC", "cc")
    cxx = find_compiler("CXX", "c++")
    flags = [f"{name}={os.environ[name]}" for name in _FLAG_VARIABLES if name in os.environ]
    identity = "\n".join([_version(cc), _version(cxx), *flags])
    return Toolchain(_find_tool("cmake"), _find_tool("ninja"), identity, cuda)


def find_compiler(variable: str, default: str) -> list[str]:
    command = shlex.split(os.environ.get(variable) or default)
    if not shutil.which(command[0]):
        raise MonarchError(f"no compiler: {variable} is {command[0]!r}, which is not on PATH; install one "
                           "(Debian and Ubuntu: apt install build-essential)")
    return command


def _version(compiler: list[str]) -> str:
    result = subprocess.run([*compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise MonarchError(f"{shlex.join(compiler)} --version failed with status {result.returncode}; reinstall it")
    return f"{shlex.join(compiler)}: {result.stdout.partition(chr(10))[0]}"


def _find_tool(name: str) -> str:
    """From the PyPI package of that name, which the wheel depends on, or from PATH."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=search):
        return found
    raise MonarchError(f"{name} is missing: pip install {name}")


@dataclasses.dataclass
class Runner:
    """Runs long commands: output into a log, progress onto stderr."""

    log: Path
    progress: Progress
    lock_fd: int  # inherited, so that an orphaned ninja still keeps a second build out

    def run(self, label: str, command: list[str], ceiling: Path) -> None:
        environment = os.environ | {
            "LC_ALL": "C",
            "NINJA_STATUS": "[%f/%t] ",
            "GIT_CEILING_DIRECTORIES": str(ceiling),  # no surrounding repository is llama.cpp's own
        }
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=environment, pass_fds=(self.lock_fd,))
        try:
            self._follow(label, process)
        except BaseException:
            process.terminate()
            process.wait()
            self.progress.break_line()
            raise
        if process.wait() != 0:
            self._fail(label)

    def _follow(self, label: str, process: subprocess.Popen) -> None:
        with self.log.open("a", buffering=1) as log:
            for line in process.stdout:
                log.write(line)
                if match := _NINJA_COUNT.match(line):
                    self.progress.count(label, int(match[1]), int(match[2]))

    def _fail(self, label: str) -> None:
        self.progress.break_line()
        lines = self.log.read_text().splitlines()
        if any("No space left on device" in line for line in lines):
            raise MonarchError(f"{label}: no space left on device; free some, or point MONARCH_CACHE to another disk")
        for line in lines[-_TAIL_LINES:]:
            self.progress.step(f"    {line}")
        raise MonarchError(f"{label} failed; the full log is {self.log}")


def configure(runner: Runner, tools: Toolchain, arm_dir: Path, options: dict[str, str]) -> None:
    command = [tools.cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    command += ["-S", str(arm_dir / "src"), "-B", str(arm_dir / "build")]
    _forget_moved_tree(arm_dir / "build")
    runner.run(f"{arm_dir.name}: configuring", command, arm_dir)


def _forget_moved_tree(build: Path) -> None:
    """CMake refuses one that was made elsewhere, as when the cache was moved or copied."""
    made = build / "CMakeCache.txt"
    if made.is_file() and f"CMAKE_CACHEFILE_DIR:INTERNAL={build}" not in made.read_text(errors="replace").splitlines():
        shutil.rmtree(build)


def compile_targets(runner: Runner, tools: Toolchain, arm_dir: Path, targets: list[str], jobs: int) -> None:
    command = [tools.ninja, "-C", str(arm_dir / "build"), "-j", str(jobs), *targets]
    runner.run(f"{arm_dir.name}: compiling", command, arm_dir)


def is_installed(built: Path, bin_dir: Path) -> bool:
    """Nothing is missing of what install() copied: caches are tidied by hand, or by age."""
    return bin_dir.is_dir() and all((bin_dir / file.name).exists() for file in built.glob("*"))


def install(built: Path, bin_dir: Path) -> None:
    """Copies libraries and tools. Each is replaced by a rename: a process that uses the old one keeps it."""
    bin_dir.mkdir(exist_ok=True)
    names = {file.name for file in built.iterdir()}
    for stale in {file.name for file in bin_dir.iterdir()} - names:
        (bin_dir / stale).unlink()
    for name in names:
        temp = bin_dir / f"{name}.tmp"
        temp.unlink(missing_ok=True)
        shutil.copy2(built / name, temp, follow_symlinks=False)
        os.replace(temp, bin_dir / name)
