"""Applies patches/ to the pinned llama.cpp.

The source is pinned by hash, so a hunk either matches exactly where it says or the patch is wrong: no fuzz, no
offsets, no external tool. The result is compared with patches/SHA256SUMS, and a patch may remove only those upstream
lines that patches/REMOVED_LINES lists.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import MonarchError

SERIES = "series"
SUMS = "SHA256SUMS"
REMOVED = "REMOVED_LINES"

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")

Reader = Callable[[str], bytes]


@dataclasses.dataclass
class Hunk:
    old_start: int
    old_count: int
    new_count: int
    lines: list[bytes] = dataclasses.field(default_factory=list)

    def side(self, sign: bytes) -> list[bytes]:
        """The lines of the old (sign "-") or new (sign "+") file that this hunk covers."""
        return [line[1:] for line in self.lines if line[:1] in (b" ", sign)]


@dataclasses.dataclass
class FilePatch:
    path: str
    hunks: list[Hunk] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Patch:
    name: str
    header: bytes
    files: list[FilePatch]


def read_series(folder: Path) -> dict[str, list[str]]:
    """patches/series: the patches in order, each followed by the upstream files it owns, indented."""
    series: dict[str, list[str]] = {}
    name = None
    owned = set()
    for line in (folder / SERIES).read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace():
            name = line.strip()
            series[name] = []
        elif name is None or line.strip() in owned:
            raise MonarchError(f"{folder / SERIES}: {line.strip()}: needs exactly one patch that owns it")
        else:
            series[name].append(line.strip())
            owned.add(line.strip())
    return series


def _split_lines(text: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", text)  # splitlines() would also split at a lone carriage return


def parse_patch(name: str, text: bytes) -> Patch:
    lines = _split_lines(text)
    start = next((i for i, line in enumerate(lines) if line.startswith(b"--- ")), len(lines))
    patch = Patch(name, b"".join(lines[:start]), [])
    i = start
    while i < len(lines):
        path = _file_header(name, lines, i)
        file = FilePatch(path)
        i += 2
        while i < len(lines) and lines[i].startswith(b"@@"):
            hunk, i = _parse_hunk(name, lines, i)
            file.hunks.append(hunk)
        patch.files.append(file)
    return patch


def _file_header(name: str, lines: list[bytes], i: int) -> str:
    old, new = (line.rstrip().decode() for line in (lines + [b""])[i : i + 2])
    if old[:6] != "--- a/" or new != "+++ b/" + old[6:]:
        raise MonarchError(f"{name}: {old!r}, {new!r}: a patch changes upstream files; new files belong in native/")
    return old[6:]


def _parse_hunk(name: str, lines: list[bytes], i: int) -> tuple[Hunk, int]:
    match = _HUNK.match(lines[i])
    if not match:
        raise MonarchError(f"{name}: malformed hunk {lines[i]!r}; refresh the patch")
    start, old_count, new_count = (1 if group is None else int(group) for group in match.groups())
    hunk = Hunk(start, old_count, new_count)
    i += 1
    while i < len(lines) and lines[i][:1] in (b" ", b"-", b"+", b"\\") and not _is_complete(hunk, lines[i]):
        if lines[i][:1] == b"\\":  # "\ No newline at end of file" belongs to the line before
            hunk.lines[-1] = hunk.lines[-1].rstrip(b"\n")
        else:
            hunk.lines.append(lines[i])
        i += 1
    if not _has_counts(hunk):
        raise MonarchError(f"{name}: the hunk at line {start} is cut short; refresh the patch")
    return hunk, i


def _has_counts(hunk: Hunk) -> bool:
    return len(hunk.side(b"-")) == hunk.old_count and len(hunk.side(b"+")) == hunk.new_count


def _is_complete(hunk: Hunk, line: bytes) -> bool:
    return _has_counts(hunk) and line[:1] != b"\\"


def apply_file(name: str, file: FilePatch, content: bytes) -> bytes:
    old = _split_lines(content)
    new: list[bytes] = []
    done = 0
    for hunk in file.hunks:
        start = hunk.old_start - 1 if hunk.old_count else hunk.old_start
        if start < done or old[start : start + hunk.old_count] != hunk.side(b"-"):
            raise MonarchError(f"{name}: {file.path}:{hunk.old_start} is not what the patch expects; refresh the patch")
        new += old[done:start] + hunk.side(b"+")
        done = start + hunk.old_count
    return b"".join(new + old[done:])


def read_patches(folder: Path) -> list[Patch]:
    """The series, checked: every listed patch exists, none lies beside it unlisted, each changes just what it owns."""
    series = read_series(folder)
    found = {file.name for file in folder.glob("*.patch")}
    if odd := found.symmetric_difference(series):
        raise MonarchError(f"{folder}: {', '.join(sorted(odd))}: {SERIES} and the *.patch files differ")
    patches = [parse_patch(name, (folder / name).read_bytes()) for name in series]
    for patch in patches:
        changed = [file.path for file in patch.files]
        if sorted(changed) != sorted(series[patch.name]):
            raise MonarchError(f"{patch.name}: changes {', '.join(changed)}: not the files that {SERIES} lists")
    return patches


def removed_lines(patches: Iterable[Patch]) -> collections.Counter[str]:
    counter: collections.Counter[str] = collections.Counter()
    for patch in patches:
        for file in patch.files:
            counter.update(_removed_from(file))
    return counter


def _removed_from(file: FilePatch) -> list[str]:
    lines = [line for hunk in file.hunks for line in hunk.lines]
    return [f"{file.path}: {line[1:].decode().strip()}" for line in lines if line[:1] == b"-"]


def check_removed_lines(folder: Path, patches: list[Patch]) -> None:
    allowed = collections.Counter((folder / REMOVED).read_text().splitlines())
    for entry in removed_lines(patches) - allowed:
        raise MonarchError(f"patches remove an upstream line that {folder / REMOVED} does not allow: {entry}")


def apply_patches(folder: Path, read: Reader) -> dict[str, bytes]:
    """The patched files, from upstream's as read by `read(path)`, verified against the sums."""
    patches = read_patches(folder)
    check_removed_lines(folder, patches)
    result = {}
    for patch in patches:
        for file in patch.files:
            result[file.path] = apply_file(patch.name, file, read(file.path))
    _check_sums(folder, result)
    return result


def format_sums(files: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files))


def _check_sums(folder: Path, files: dict[str, bytes]) -> None:
    want = dict(line.split("  ", 1)[::-1] for line in (folder / SUMS).read_text().splitlines())
    have = dict(line.split("  ", 1)[::-1] for line in format_sums(files).splitlines())
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise MonarchError(f"{path}: the patched file does not match {folder / SUMS}; refresh or restore patches/")
