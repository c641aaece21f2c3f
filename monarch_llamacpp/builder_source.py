"""From the pinned sdist to source trees: fetch, verify, extract, and keep a tree equal to what it should hold."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from . import builder_patch
from .errors import MonarchError
from .hashes import hash_file
from .pin import Pin

VENDORED = "vendor/llama.cpp"
NATIVE = "monarch"  # native/ inside the patched tree

# two thirds of the source, which no build reads
NOT_COPIED = {"docs", "models", "media"}

Content = bytes | Path


def ensure_sdist(pin: Pin, cache: Path, given: Path | None) -> Path:
    """The verified sdist: the given file, the cached one, or a fresh download."""
    if given:
        verify_sdist(pin, given)
        return given
    kept = cache / pin.sdist
    if not kept.is_file():
        download_sdist(pin, cache)
    verify_sdist(pin, kept)
    return kept


def download_sdist(pin: Pin, cache: Path) -> None:
    temp = fresh_folder(cache / "download.tmp")
    # with the hash in a requirements file pip itself refuses another file, before it runs anything from it
    requirements = temp / "requirements.txt"
    requirements.write_text(f"llama-cpp-python=={pin.llama_cpp_python} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    command += ["--require-hashes", "--no-cache-dir"]  # this cache keeps it
    command += ["--dest", str(temp), "--requirement", str(requirements)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0 or not (temp / pin.sdist).is_file():
        raise MonarchError(f"pip could not download {pin.sdist} ({_pip_error(result.stdout)}): "
                           "check the network, or fetch it elsewhere and pass it with --sdist FILE")
    os.replace(temp / pin.sdist, cache / pin.sdist)
    shutil.rmtree(temp)


def _pip_error(output: str) -> str:
    errors = [line for line in output.splitlines() if "ERROR" in line or "No module named" in line]
    return errors[-1].strip() if errors else "no reason given"


def verify_sdist(pin: Pin, file: Path) -> None:
    try:
        digest = hash_file(file)
    except OSError as error:
        raise MonarchError(f"{file}: {error.strerror}; name the {pin.sdist} to build from") from error
    if digest != pin.sha256:
        raise MonarchError(f"{file}: SHA-256 {digest} is not the pinned {pin.sha256}: delete the file and build again")


def upstream_dir(pin: Pin, cache: Path) -> Path:
    """llama.cpp as the sdist holds it, once ensure_upstream() has put it there."""
    return cache / f"upstream-{pin.sha256[:12]}"


def ensure_upstream(pin: Pin, cache: Path, given: Path | None) -> Path:
    folder = upstream_dir(pin, cache)
    if not folder.is_dir():
        sdist = ensure_sdist(pin, cache, given)
        temp = fresh_folder(cache / "upstream.tmp")
        extract(sdist, temp)
        temp.rename(folder)
    return folder


def extract(sdist: Path, folder: Path) -> None:
    """Unpacks the vendored llama.cpp only, without its gitlink; refuses a member that could escape."""
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                _extract_member(archive, member, folder)
    except (tarfile.TarError, EOFError) as error:
        raise MonarchError(f"{sdist}: not a readable archive ({error}); delete it and build again") from error


def _extract_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
        raise MonarchError(f"{archive.name}: unsafe member {member.name!r}; do not use this archive")
    inside = path.parts[1:3] == PurePosixPath(VENDORED).parts and path.parts[3:] not in ((), (".git",))
    if not inside or member.isdir():
        return
    target = folder.joinpath(*path.parts[3:])
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.extractfile(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def fresh_folder(folder: Path) -> Path:
    """An empty folder, whatever an interrupted run left in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def own_files(folder: Path) -> dict[str, Path]:
    """The files of native/ or patches/, without what editors and interpreters leave beside them."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {path.as_posix(): file for path, file in files.items() if not _is_litter(path)}


def _is_litter(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) or part.endswith("~") for part in path.parts)


def upstream_files(upstream: Path) -> dict[str, Content]:
    files: dict[str, Content] = {}
    for folder, names, entries in os.walk(upstream):
        if Path(folder) == upstream:
            names[:] = [name for name in names if name not in NOT_COPIED]
        for entry in entries:
            file = Path(folder, entry)
            files[file.relative_to(upstream).as_posix()] = file
    return files


def patched_files(upstream: Path, patches: Path, native: Path) -> dict[str, Content]:
    files = upstream_files(upstream)
    files |= builder_patch.apply_patches(patches, lambda path: read_upstream(upstream, path))
    files |= {f"{NATIVE}/{path}": file for path, file in own_files(native).items()}
    return files


def read_upstream(upstream: Path, path: str) -> bytes:
    try:
        return (upstream / path).read_bytes()
    except FileNotFoundError:
        raise MonarchError(f"{path}: patches/ changes it, but the pinned llama.cpp has no such file") from None


def sync_tree(tree: Path, files: Mapping[str, Content]) -> None:
    """Makes the tree hold exactly these files. One that is right already keeps its time, so ninja leaves it alone."""
    present = {file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file() or file.is_symlink()}
    for path in present - files.keys():
        (tree / path).unlink()
    for path, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        target = tree / path
        if path not in present or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
