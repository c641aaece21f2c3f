"""`python -m monarch_llamacpp build`: both llama.cpp libraries, stock and patched, from one pinned source."""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from . import builder_cmake, builder_cuda, builder_recipe, builder_shim, builder_source, paths, pin
from .builder_stamp import Built, read_stamp, write_stamp
from .errors import MonarchError, UsageError
from .progress import Progress

# the sdist 75 MB, unpacked 176 MB; an arm 122 MB
SOURCE_SPACE = 260 << 20
ARM_SPACE = 140 << 20
CUDA_ARM_SPACE = 2 << 30


def open_lock(cache: Path) -> TextIO:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return (cache / "lock").open("w")
    except OSError as error:
        raise MonarchError(f"{error.filename}: {error.strerror}: "
                           "point MONARCH_CACHE to a folder that can be written to") from error


@contextlib.contextmanager
def build_lock(cache: Path, progress: Progress) -> Iterator[int]:
    """One build at a time in one cache. The kernel lets go of it whatever way the holder ends."""
    with open_lock(cache) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step(f"waiting for another build in {cache}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@dataclasses.dataclass
class Builder:
    cache: Path
    pin: pin.Pin
    sdist: Path | None
    tools: builder_cmake.Toolchain
    jobs: int
    progress: Progress
    lock_fd: int

    def build(self, arm: str, targets: list[str]) -> Built:
        key = builder_recipe.tree_key(arm, self.pin, self.tools.identity, self.tools.cuda)
        built = read_stamp(self.cache / f"{arm}-{key}")
        installed = builder_cmake.is_installed(built.arm_dir / "build" / "bin", built.bin_dir)
        if installed and built.digest == self._digest(arm) and set(targets) <= set(built.targets):
            write_stamp(built)  # the newest stamp is the one that is used
            self.progress.step(f"{arm}: up to date in {built.bin_dir}")
        else:
            # tools that an earlier build made are kept up to date with their library
            built = self._bring_up_to_date(arm, built.arm_dir, sorted({*targets, *built.targets}))
        if arm == "patched":
            builder_shim.ensure_shim(built.arm_dir, self.progress)
        return built

    def _digest(self, arm: str) -> str:
        return builder_recipe.build_digest(arm, self.pin, self.tools.cuda.architectures)

    def _bring_up_to_date(self, arm: str, arm_dir: Path, targets: list[str]) -> Built:
        if not arm_dir.exists():
            check_space(self.cache, self._space_needed())
        built = Built(arm_dir, self._digest(arm), targets, self.tools.cuda.architectures)
        self._write_source(arm, arm_dir / "src")
        self._compile(arm, arm_dir, targets)
        write_stamp(dataclasses.replace(built, digest=""))
        builder_cmake.install(arm_dir / "build" / "bin", built.bin_dir)
        write_stamp(built)
        self.progress.step(f"{arm}: built in {built.bin_dir}")
        return built

    def _space_needed(self) -> int:
        arm = CUDA_ARM_SPACE if self.tools.cuda.architectures else ARM_SPACE
        return arm if builder_source.upstream_dir(self.pin, self.cache).is_dir() else arm + SOURCE_SPACE

    def _write_source(self, arm: str, tree: Path) -> None:
        upstream = self._upstream()
        if arm != "stock":
            self.progress.step(f"{arm}: applying patches")
            files = builder_source.patched_files(upstream, paths.patches_dir(), paths.native_dir())
        else:
            files = builder_source.upstream_files(upstream)
        tree.mkdir(parents=True, exist_ok=True)
        builder_source.sync_tree(tree, files)

    def _upstream(self) -> Path:
        if not builder_source.upstream_dir(self.pin, self.cache).is_dir():
            self.progress.step(f"fetching, verifying and unpacking {self.pin.sdist}")
        return builder_source.ensure_upstream(self.pin, self.cache, self.sdist)

    def _compile(self, arm: str, arm_dir: Path, targets: list[str]) -> None:
        log = arm_dir / "build.log"
        log.unlink(missing_ok=True)
        runner = builder_cmake.Runner(log, self.progress, self.lock_fd)
        self.progress.step(f"{arm}: compiling; {self._duration()} the first time, log in {log}")
        options = builder_recipe.cmake_options(arm, self.pin, self.tools.cuda)
        builder_cmake.configure(runner, self.tools, arm_dir, options)
        builder_cmake.compile_targets(runner, self.tools, arm_dir, targets, self.jobs)

    def _duration(self) -> str:
        return "with CUDA much longer than without" if self.tools.cuda.architectures else "about 4 minutes on 2 cores"


def check_python_headers() -> None:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise MonarchError(f"Python.h is missing in {folder}: install Python's headers "
                           "(Debian and Ubuntu: apt install python3-dev)")


def check_space(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise MonarchError(f"{cache}: {free >> 20} MB free, a build needs {needed >> 20} MB: "
                           "free some, or point MONARCH_CACHE to another disk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="with the CUDA backend, for the cards in this machine")
    parser.add_argument("--cuda-arch", metavar="LIST", help="with the CUDA backend, for these architectures: 75,86,90")
    parser.add_argument("--tools", action="store_true", help=f"also {', '.join(builder_recipe.TOOLS)}")
    parser.add_argument("--sanitizer", choices=builder_recipe.SANITIZERS, help="only the library, instrumented")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilers at once (default: one per CPU)"
    )
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="the pinned sdist, instead of fetching it with pip")


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: needs at least 1")
    pinned = pin.read_pin()
    cache = paths.cache_dir()
    if args.sdist:
        builder_source.verify_sdist(pinned, args.sdist)
    check_python_headers()
    cuda = builder_cuda.find_cuda(args.cuda_arch) if args.cuda or args.cuda_arch else builder_recipe.NO_CUDA
    tools = builder_cmake.find_toolchain(cuda)
    targets = [builder_recipe.LIBRARY, *(builder_recipe.TOOLS if args.tools else ())]
    progress = Progress()
    with build_lock(cache, progress) as lock_fd:
        builder = Builder(cache, pinned, args.sdist, tools, args.jobs, progress, lock_fd)
        # patched first: it is the one whose sources change
        for arm in [args.sanitizer] if args.sanitizer else reversed(builder_recipe.ARMS):
            builder.build(arm, targets)
    return 0
