"""Arms of `ab` whose processes get more in their environment."""

import os
from dataclasses import dataclass

from child import TESTS

from monarch_llamacpp.ab_arms import Arm


@dataclass(frozen=True)
class ArmWith(Arm):
    extra: tuple[tuple[str, str], ...] = ()

    def environment(self) -> dict[str, str]:
        return super().environment() | dict(self.extra)


def python_path(folder: str) -> tuple[str, str]:
    """tests/<folder>, whose sitecustomize.py runs first, then the tests and the package."""
    path = [str(TESTS / folder), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return "PYTHONPATH", os.pathsep.join(path)
