"""chat that is ended at the last moment: with the last token of an answer, or while its conversation is written."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from monarch_llamacpp import chat
from monarch_llamacpp.chat_session import Session
from monarch_llamacpp.cli import run_command

generate, save_session = Session._tokens, chat.save_session


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def end_after_tokens(session: Session, n_predict: int) -> Iterator[int]:
    yield from generate(session, n_predict)
    end()


def end_before_save(session: Session, path: Path) -> int:
    end()
    return save_session(session, path)


if sys.argv.pop(1) == "answer":
    Session._tokens = end_after_tokens
else:
    chat.save_session = end_before_save
sys.exit(run_command("chat", sys.argv[1:]))
