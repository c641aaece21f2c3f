"""The novels: read from a folder or a tar archive, paragraphs joined, some kept out for validation."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path


def read_novels(path: Path) -> dict[str, str]:
    """File names with their texts, in the order of the names."""
    if path.is_dir():
        raw = {file.name: file.read_bytes() for file in path.rglob("*.txt")}
    else:
        with tarfile.open(path) as archive:
            files = [member for member in archive if member.isfile() and member.name.endswith(".txt")]
            raw = {Path(member.name).name: archive.extractfile(member).read() for member in files}
    return {name: join_lines(raw[name].decode("utf-8", errors="replace")) for name in sorted(raw)}


def join_lines(text: str) -> str:
    """The text with paragraphs as lines: the files wrap lines hard."""
    text = text.replace("\r", "")
    if "\n\n" not in text:
        text = re.sub(r"\n(?=[ \"'A-Z])", "\n\n", text)
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(line for line in lines if line)


def split_novels(novels: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts for training and, every twentieth, for validation."""
    names = list(novels)
    kept_out = names[10::20]
    return [novels[name] for name in names if name not in kept_out], [novels[name] for name in kept_out]
