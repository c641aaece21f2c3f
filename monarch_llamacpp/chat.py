"""python -m monarch_llamacpp chat model.gguf"""

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .chat_commands import COMMANDS, Leave, read_text, run_command
from .chat_input import History, ReadLine, pipe_line, read_entry, terminal_line
from .chat_state import load_session, save_session
from .chat_view import ProgressLine, pages_summary, say, turn_line
from .checks import check_ctx_size, check_gpu_layers, check_threads
from .cores import n_cores
from .errors import MonarchError, UsageError
from .knobs import Knobs, add_knob_arguments, knobs_from_args, specs
from .output_file import check_flag_output
from .template import PlainText
from .units import MIB

if TYPE_CHECKING:
    from .chat_session import Session, Turn
    from .llama import Llama

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-p", "--prompt", help="answer this and leave; piped input is put before it")
    parser.add_argument(
        "-f", "--file", help="a text put before the first message, as long as --ctx-size holds; - is standard input"
    )
    parser.add_argument("--session", type=Path, metavar="FILE", help="go on with the conversation kept in it")
    parser.add_argument("--ctx-size", type=int, default=0, metavar="N", help="most tokens held (default: as trained)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the number of cores)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampler (default: another each time)")
    parser.add_argument("--temp", type=float, default=0.8, metavar="T", help="0: always the likeliest (default: 0.8)")
    parser.add_argument(
        "-n", "--n-predict", type=int, default=-1, metavar="N", help="most tokens of an answer (default: until it ends)"
    )
    parser.add_argument("--n-gpu-layers", type=int, default=-1, metavar="N", help="(default: all, on a CUDA build)")
    add_knob_arguments(parser)


def run(args: argparse.Namespace) -> int:
    knobs = knobs_from_args(args)
    _check(args)
    _make_streams_lenient()
    session = _open_session(args, knobs)
    with closing(session):
        return Chat(session, knobs, args.n_predict).run(args)


class Chat:
    """A session, and the person or pipe that talks to it."""

    def __init__(self, session: Session, knobs: Knobs, n_predict: int) -> None:
        self.session = session
        self.llm: Llama = session.llm
        self._knobs = knobs
        self._n_predict = n_predict
        self._failed = False
        self._interrupted = False
        self._progress = ProgressLine()

    def run(self, args: argparse.Namespace) -> int:
        try:
            return self._run(args)
        except KeyboardInterrupt:
            self._progress.clear()
            return INTERRUPTED

    def _run(self, args: argparse.Namespace) -> int:
        if args.session and args.session.exists():
            n_tokens = load_session(self.session, args.session)
            say(f"{args.session}: {n_tokens} tokens, {len(self.session.messages)} messages")
        try:
            return self._answer_all(args)
        finally:
            if args.session:
                with self.session.interrupts.kept_whole():
                    self.save(args.session)

    def _answer_all(self, args: argparse.Namespace) -> int:
        self._warn_beyond_training()
        if args.file:
            self.load(args.file)
        if args.prompt is None:
            return self._converse()
        if not args.file and _is_piped(sys.stdin):
            self.session.add_context(read_text("-"))
        self.ask(_decode_argument(args.prompt))
        return self._status()

    def _converse(self) -> int:
        if not sys.stdin.isatty():
            self._loop(pipe_line)
            return self._status()
        say(self._greeting())
        history = History([*COMMANDS, *(f"/set {name}" for name in specs())])
        history.load()
        try:
            self._loop(terminal_line)
        finally:
            history.save()
        return 0

    def _status(self) -> int:
        if self._interrupted:
            return INTERRUPTED
        return 1 if self._failed else 0

    def _loop(self, read_line: ReadLine) -> None:
        """Until the input ends, /exit, or Ctrl-C twice (in a pipe: once)."""
        while True:
            try:
                if not self._step(read_line):
                    return
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True
                say("\n(Ctrl-C again or /exit leaves)")
            if self._interrupted and read_line is pipe_line:
                return

    def _step(self, read_line: ReadLine) -> bool:
        entry = read_entry(read_line)
        if entry is None:
            return False
        self._interrupted = False
        try:
            if entry.is_command:
                run_command(self, entry.text)
            elif entry.text.strip():
                self.ask(entry.text)
        except Leave:
            return False
        except MonarchError as error:
            self._report(error)
        return True

    def ask(self, text: str) -> None:
        self._show(self.session.ask(text, self._n_predict, self._answer(), self._progress))

    def regenerate(self) -> None:
        self._show(self.session.regenerate(self._n_predict, self._answer(), self._progress))

    def load(self, path: str) -> None:
        n_tokens = self.session.add_context(read_text(path))
        say(f"{path}: {n_tokens} of {self.session.decoder.n_ctx} tokens, put before the next message")

    def save(self, path: Path) -> None:
        n_bytes = save_session(self.session, path)
        say(f"{path}: {len(self.session.decoder.held)} tokens kept in {n_bytes / MIB:.1f} MiB")

    def _show(self, turn: Turn) -> None:
        self._progress.clear()
        if turn.text:
            self._write("\n")
        if turn.n_answer:
            say(turn_line(turn, self._pages()))
        if turn.error:
            self._report(turn.error)
        if turn.stopped:
            self._stop(turn)
        self.session.interrupts.leave_if_ended()

    def _stop(self, turn: Turn) -> None:
        self._interrupted = True
        if not turn.answered:
            n_held = len(self.session.decoder.held)
            say(f"stopped after {n_held} tokens of the prompt, which stay: send the message again to go on")
        if self.session.interrupts.count > 1:
            self.session.interrupts.leave()

    def _warn_beyond_training(self) -> None:
        trained = self.session.n_ctx_train
        if self.session.decoder.n_ctx > trained:
            say(f"warning: the model was trained on {trained} tokens of context: beyond them its answers get worse")

    def _pages(self) -> str:
        try:
            return pages_summary(self.llm.stats(), self._knobs.page_size)
        except MonarchError:
            return "paging off"

    def _report(self, error: MonarchError) -> None:
        self._failed = True
        say(f"error: {error}")

    def _answer(self) -> Callable[[str], None]:
        """Writes an answer as it comes; many begin with a space that belongs to the template."""
        started = isinstance(self.session.template, PlainText)

        def write(text: str) -> None:
            nonlocal started
            text = text if started else text.lstrip()
            started = started or bool(text)
            self._write(text)

        return write

    def _write(self, text: str) -> None:
        self._progress.clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def _greeting(self) -> str:
        n_ctx = self.session.decoder.n_ctx
        name = self.llm.metadata.get("general.name") or Path(self.llm.model_path).name
        return f"{name}, {n_ctx} tokens of context, mode {self._knobs.mode}. /help lists the commands"


def _check(args: argparse.Namespace) -> None:
    check_ctx_size("--ctx-size", args.ctx_size)
    check_threads("--threads", args.threads)
    check_gpu_layers("--n-gpu-layers", args.n_gpu_layers)
    if args.n_predict < -1:
        raise UsageError(f"-n {args.n_predict}: allowed is 0 and more, -1 until the model ends its answer")
    if not 0 <= args.temp < float("inf"):
        raise UsageError(f"--temp {args.temp}: allowed is 0 and more")
    if args.seed is not None and not 0 <= args.seed < 1 << 32:
        raise UsageError(f"--seed {args.seed}: allowed is 0 to {(1 << 32) - 1}")
    if args.session and not args.session.absolute().parent.is_dir():
        raise UsageError(f"--session {args.session}: its folder does not exist")
    if args.session:  # one that cannot be kept is refused before the conversation
        check_flag_output("--session", args.session)
    if args.file == "-" and args.prompt is None:
        raise UsageError("--file - needs --prompt: standard input cannot be both text and conversation")


def _decode_argument(text: str) -> str:
    """Python keeps bytes of an argument that are no text as lone surrogates, which no tokenizer takes."""
    return os.fsencode(text).decode(errors="replace")


def _make_streams_lenient() -> None:
    """Neither a locale without emoji, nor input that is no UTF-8 ends a conversation."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def _open_session(args: argparse.Namespace, knobs: Knobs) -> Session:
    # importing these loads the library; Python would hold signals back until the model is loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from .chat_session import Interrupts, Sampling, Session
    from .llama import Llama

    n_threads = args.threads or n_cores()
    llm = Llama(
        args.model,
        paging=knobs,
        n_ctx=args.ctx_size,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        n_gpu_layers=args.n_gpu_layers,
        verbose=args.debug,
    )
    interrupts = Interrupts()
    interrupts.install()
    sampling = Sampling(temp=args.temp) if args.seed is None else Sampling(args.temp, args.seed)
    return Session(llm, interrupts, sampling)


def _is_piped(stream: object) -> bool:
    """A pipe or a file with text for us; not a terminal, a closed stream or /dev/null."""
    mode = os.fstat(stream.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


if __name__ == "__main__":
    from .cli import run_command

    sys.exit(run_command("chat", sys.argv[1:]))
