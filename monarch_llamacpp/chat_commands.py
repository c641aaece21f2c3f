"""The /commands of chat."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .chat_view import knobs_table, pages_picture, say, stats_table
from .errors import MonarchError, UsageError

if TYPE_CHECKING:
    from .chat_session import Session
    from .llama import Llama


class Leave(Exception):
    """/exit"""


class Chat(Protocol):
    """What the commands need of the chat."""

    session: Session
    llm: Llama

    def regenerate(self) -> None: ...
    def load(self, path: str) -> None: ...
    def save(self, path: Path) -> None: ...


@dataclass(frozen=True)
class Command:
    argument: str
    help: str
    run: Callable[[Chat, str], None]


def run_command(chat: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name}: /help lists them")
    COMMANDS[name].run(chat, argument.strip())


def read_text(path: str) -> str:
    """A text file, - for standard input."""
    if path == "-":
        return sys.stdin.read()
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise MonarchError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in data:
        raise MonarchError(f"cannot read {path}: it is not a text file")
    return data.decode("utf-8", "replace")


def _help(_chat: Chat, _argument: str) -> None:
    for name, command in COMMANDS.items():
        say(f"{name + ' ' + command.argument:<18} {command.help}")
    say('""" ... """ or a \\ at the end of a line: a message of several lines. Ctrl-C: stop the answer, twice: leave')


def _clear(chat: Chat, _argument: str) -> None:
    chat.session.clear()
    say("conversation forgotten")


def _regen(chat: Chat, _argument: str) -> None:
    chat.regenerate()


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.session.system = text
    say(f"system message: {chat.session.system or 'none'}")


def _load(chat: Chat, path: str) -> None:
    if not path:
        raise UsageError("/load needs a file")
    chat.load(path)


def _save(chat: Chat, path: str) -> None:
    if not path:
        raise UsageError("/save needs a file; --session FILE goes on with it")
    chat.save(Path(path).expanduser())


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name and not value:
        raise UsageError("/set needs a knob and a value; /set alone lists the knobs")
    if not name:
        say(knobs_table(chat.llm.knobs()))
        return
    chat.llm.set_knob(name, value.strip())
    say(f"{name} = {value.strip()}")


def _stats(chat: Chat, _argument: str) -> None:
    say(stats_table(chat.llm.stats()))


def _pages(chat: Chat, _argument: str) -> None:
    width = shutil.get_terminal_size().columns
    llm = chat.llm
    say(pages_picture(llm.pages(), llm.stats(), llm.knobs(), width, color=sys.stderr.isatty()))


def _exit(_chat: Chat, _argument: str) -> None:
    raise Leave


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/clear": Command("", "forget the conversation", _clear),
    "/regen": Command("", "answer the last message again", _regen),
    "/system": Command("TEXT", "set the system message", _system),
    "/load": Command("FILE", "put a text file before the next message", _load),
    "/save": Command("FILE", "keep the conversation; --session FILE goes on with it", _save),
    "/set": Command("KNOB VALUE", "change a knob; alone: list them", _set),
    "/stats": Command("", "statistics of the cache", _stats),
    "/pages": Command("", "a picture of the page table", _pages),
    "/exit": Command("", "leave (also Ctrl-D)", _exit),
}
