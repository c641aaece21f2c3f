"""The command line: `python -m monarch_llamacpp COMMAND ...`, exit statuses, and errors in one line."""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .errors import MonarchError, UsageError

PROGRAM = "python -m monarch_llamacpp"

# command: what it does; its module of the same name has add_arguments(parser) and run(args) -> exit status
COMMANDS = {
    "build": "fetch, verify, patch and build llama.cpp: stock and patched",
    "info": "versions, pin, ABI, backends and paths",
    "chat": "talk to a model",
    "convert": "turn a Hugging Face checkpoint into a GGUF",
    "ab": "compare with unmodified upstream: speed, memory, quality",
    "recall": "write the constructed recall model",
}


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line, as every failure; argparse writes all options before it."""
        self.exit(UsageError.exit_status, f"error: {message}; {self.prog} --help tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv[:1])
    return run_command(args.command, argv[1:])


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items())
    parser = _ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description=f"A paged KV cache for llama.cpp.\n\ncommands:\n{listing}",
        epilog=f"{PROGRAM} COMMAND --help tells more",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def run_command(command: str, argv: Sequence[str]) -> int:
    """Runs one command and turns every failure into one line and an exit status."""
    debug = "--debug" in argv
    _open_closed_streams()
    signal.signal(signal.SIGTERM, _end)  # as an exception: children end, and half-written files go
    try:
        module = importlib.import_module(f"{__package__}.{command}")
        parser = _ArgumentParser(prog=f"{PROGRAM} {command}", description=COMMANDS[command])
        module.add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        status = module.run(parser.parse_args(argv))
        _flush_output()
        return status
    except BrokenPipeError:
        # the reader of our output has gone, for example `| head`: nothing to say, and nobody to say it to
        _drop_output()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_explain(error, debug)}", file=sys.stderr)
        with contextlib.suppress(OSError):
            _flush_output()
        return error.exit_status if isinstance(error, MonarchError) else 1


def _end(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _open_closed_streams() -> None:
    """Where the caller closed one, Python has None, and would print errors among the answers."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def _flush_output() -> None:
    """What cannot be written is an error of ours; the interpreter would end with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception, debug: bool) -> str:
    if isinstance(error, MonarchError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on device{_at(error)}; free some, or point MONARCH_CACHE to another disk"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_at(error)}"
    hint = "" if debug else "; --debug shows where"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{hint}"


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
