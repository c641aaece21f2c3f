"""Progress of an A/B comparison: what runs, and about how long its part still takes."""

from __future__ import annotations

import time

from .progress import Progress


class PartProgress:
    """One part of the comparison, in steps of about the same length."""

    def __init__(self, part: str, total: int, progress: Progress) -> None:
        self._part = part
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._progress = progress

    def next(self, what: str) -> None:
        """Before a step."""
        self._progress.step(f"{self._part}, {self._done + 1} of {self._total}: {what}{self._time_left()}")
        self._done += 1

    def _time_left(self) -> str:
        if not self._done:
            return ""
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        return f" (about {left:.0f} s left)" if left < 90 else f" (about {left / 60:.0f} min left)"
