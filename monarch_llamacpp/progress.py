"""Progress on stderr: one line per long step, updated in place on a terminal, sparse elsewhere."""

import sys


class Progress:
    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.shown = -1  # last tenth printed where lines cannot be updated

    def step(self, text: str) -> None:
        self.shown = -1
        print(text, file=sys.stderr, flush=True)

    def count(self, text: str, done: int, total: int) -> None:
        line = f"{text}: {done}/{total}"
        if self.tty:
            print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total != self.shown:
            self.shown = done * 10 // total
            print(line, file=sys.stderr, flush=True)

    def break_line(self) -> None:
        """Leaves a line that count() was updating, so that an error starts on its own."""
        if self.tty:
            print(file=sys.stderr)
