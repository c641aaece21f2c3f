"""What the user types: lines from a terminal or a pipe, joined to messages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

from .paths import cache_dir

HISTORY_LENGTH = 1000
BLOCK = '"""'

# the next line without its end, or None at the end of input
ReadLine = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Entry:
    text: str
    is_command: bool = False


def read_entry(read_line: ReadLine) -> Entry | None:
    r'''One message: a line, lines that end with \, or a block between """ and """.'''
    line = read_line(">>> ")
    if line is None:
        return None
    if line.startswith(BLOCK):
        return Entry(_read_block(line[len(BLOCK) :], read_line))
    if line.startswith("/"):
        return Entry(line.strip(), is_command=True)
    return Entry(_read_continued(line, read_line))


def _read_block(line: str, read_line: ReadLine) -> str:
    lines = []
    while not line.rstrip().endswith(BLOCK):
        lines.append(line)
        following = read_line("... ")
        if following is None:
            break
        line = following
    else:
        lines.append(line.rstrip()[: -len(BLOCK)])
    return "\n".join(lines).strip("\n")


def _read_continued(line: str, read_line: ReadLine) -> str:
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        following = read_line("... ")
        if following is None:
            return "\n".join(lines)
        line = following
    return "\n".join([*lines, line])


def pipe_line(_prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def terminal_line(prompt: str) -> str | None:
    if not sys.stdout.isatty():
        # input() would write its prompt among the answers
        print(prompt, end="", file=sys.stderr, flush=True)
        return pipe_line(prompt)
    try:
        return input(prompt)
    except EOFError:
        return None


class History:
    """Lines typed earlier, kept in the cache folder; and completion of commands."""

    def __init__(self, words: list[str]) -> None:
        self._path: Path = cache_dir() / "chat_history"
        self._words = words

    def load(self) -> None:
        if readline is None:
            return
        readline.set_history_length(HISTORY_LENGTH)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        with contextlib.suppress(OSError):  # a history that cannot be kept is no reason to fail
            readline.read_history_file(str(self._path))

    def save(self) -> None:
        if readline is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(str(self._path))

    def _complete(self, text: str, state: int) -> str | None:
        found = [word for word in self._words if text and word.startswith(text)]
        return found[state] if state < len(found) else None
