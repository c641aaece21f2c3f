"""The arms of an A/B comparison: a build and its knobs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import library
from .knobs import ENV_PREFIX, Knobs, specs

STOCK = "stock"

# None: unmodified upstream, which has no knobs
_MODES = {STOCK: None, "patched-off": "off", "window": "window", "paged": "paged", "exact": "exact"}

ARMS = tuple(_MODES)


@dataclass(frozen=True)
class Arm:
    name: str
    bin_dir: Path
    knobs: Knobs | None

    @property
    def build(self) -> str:
        return "stock" if self.knobs is None else "patched"

    @property
    def pages(self) -> bool:
        return self.knobs is not None and self.knobs.mode != "off"

    @property
    def flash_attn(self) -> tuple[int, ...]:
        """Settings to run: upstream is judged by its best one, and a paged cache attends by itself."""
        return (0,) if self.pages else (0, 1)

    def environment(self) -> dict[str, str]:
        """For a child process: this arm's library and knobs, none of the caller's knobs."""
        ours = {ENV_PREFIX.rstrip("_"), *(spec.env for spec in specs().values())}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        knobs = {specs()[name].env: str(value) for name, value in (self.knobs or {}).items()}
        return kept | {"LLAMA_CPP_LIB_PATH": str(self.bin_dir)} | knobs


def make_arm(name: str, knobs: Knobs) -> Arm:
    mode = _MODES[name]
    if mode is None:
        return Arm(name, library.stock_dir(), None)
    return Arm(name, library.patched_dir(), knobs.replace(mode=mode))
