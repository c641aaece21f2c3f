"""A tiny llama.cpp: an sdist, patches and native/ small enough to build in no time."""

import difflib
import hashlib
import io
import tarfile
from pathlib import Path

from monarch_llamacpp import builder_patch
from monarch_llamacpp.pin import Pin

TOP = "llama_cpp_python-0"
UPSTREAM = {
    "CMakeLists.txt": b"project(fake)\n",
    "src/a.cpp": b"one\ntwo\nthree\nfour\nfive\n",
    "src/b.cpp": b"alpha\nbeta\n",
    "docs/guide.md": b"not needed\n",
}
PATCHED = {"src/a.cpp": UPSTREAM["src/a.cpp"].replace(b"three\n", b"three\nours\n")}


def write_sdist(file: Path, members: dict[str, bytes] | None = None) -> Pin:
    """An sdist of these members (names as in the archive), and the pin that fits it."""
    if members is None:
        vendored = {f"{TOP}/vendor/llama.cpp/{path}": data for path, data in UPSTREAM.items()}
        gitlink = {f"{TOP}/vendor/llama.cpp/.git": b"gitdir: elsewhere\n"}
        members = vendored | gitlink | {f"{TOP}/pyproject.toml": b""}
    with tarfile.open(file, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Pin(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "0", "0" * 40)


def unified_diff(path: str, old: bytes, new: bytes) -> bytes:
    before, after = (text.splitlines(keepends=True) for text in (old, new))
    return b"".join(difflib.diff_bytes(difflib.unified_diff, before, after, f"a/{path}".encode(), f"b/{path}".encode()))


def write_patches(folder: Path, patched: dict[str, bytes] = PATCHED) -> Path:
    folder.mkdir(exist_ok=True)
    diffs = [unified_diff(path, UPSTREAM[path], data) for path, data in patched.items()]
    (folder / "0001-fake.patch").write_bytes(b"Why it exists.\n\n" + b"".join(diffs))
    (folder / builder_patch.SERIES).write_text("0001-fake.patch\n" + "".join(f"    {path}\n" for path in patched))
    (folder / builder_patch.SUMS).write_text(builder_patch.format_sums(patched))
    (folder / builder_patch.REMOVED).write_text("")
    return folder
