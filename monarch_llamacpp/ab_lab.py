"""One A/B comparison under way: its arms, its rows, and the arms that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .ab_arms import Arm
from .ab_progress import PartProgress
from .ab_receipt import arm_receipt
from .ab_rows import Row, Rows
from .ab_settings import Settings
from .errors import MonarchError
from .progress import Progress


class Lab:
    def __init__(self, arms: Sequence[Arm], settings: Settings, rows: Rows, progress: Progress) -> None:
        self.settings = settings
        self.rows = rows
        self.progress = progress
        self._arms = list(arms)
        self._failed: set[str] = set()

    @property
    def arms(self) -> list[Arm]:
        """Those that have not failed."""
        return [arm for arm in self._arms if arm.name not in self._failed]

    def part(self, name: str, total: int) -> PartProgress:
        return PartProgress(name, total, self.progress)

    def take(
        self, kind: str, arm: Arm, asked: Callable[[Row], bool] = lambda row: True, **facts: object
    ) -> tuple[list[Row], str]:
        """What an earlier run left of this arm, and the receipt for new rows."""
        receipt = arm_receipt(arm, self.settings, **facts)
        return self.rows.take(kind, arm.name, receipt, asked), receipt

    @contextmanager
    def attempt(self, arm: Arm, part: str) -> Iterator[None]:
        """A failing arm takes no further part; the others go on."""
        try:
            yield
        except MonarchError as error:
            self._failed.add(arm.name)
            self.report_failure(arm.name, part, str(error))

    def report_failure(self, name: str, part: str, reason: str) -> None:
        self.rows.put([{"row": "failure", "arm": name, "part": part, "reason": reason}])
        self.progress.step(f"failed: {reason}")
