"""The arms of an A/B comparison: a build, its KV type and its knobs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import library
from .errors import UsageError
from .knobs import ENV_PREFIX, Knobs, Value, find_spec, specs

STOCK = "stock"

# unmodified upstream, which has no knobs
_STOCK_TYPES = {STOCK: "f16", "stock-q8_0": "q8_0", "stock-q4_0": "q4_0", "stock-iq4_nl": "iq4_nl"}
_MODES = {"patched-off": "off", "window": "window", "paged": "paged", "exact": "exact"}

ARMS = (*_STOCK_TYPES, *_MODES)


@dataclass(frozen=True)
class Arm:
    name: str
    bin_dir: Path
    knobs: Knobs | None
    type_kv: str = "f16"

    @property
    def build(self) -> str:
        return "stock" if self.knobs is None else "patched"

    @property
    def pages(self) -> bool:
        return self.knobs is not None and self.knobs.mode != "off"

    @property
    def knob_values(self) -> dict[str, Value] | None:
        """As rows hold them."""
        return dict(self.knobs) if self.knobs else None

    @property
    def flash_attn(self) -> tuple[int, ...]:
        """Settings to run: upstream is judged by its best one, which only f16 has; a paged cache attends by itself."""
        if self.pages:
            return (0,)
        return (0, 1) if self.type_kv == "f16" else (1,)

    def environment(self) -> dict[str, str]:
        """For a child process: this arm's library and knobs, none of the caller's knobs."""
        ours = {ENV_PREFIX.rstrip("_"), *(spec.env for spec in specs().values())}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        knobs = {specs()[name].env: str(value) for name, value in (self.knobs or {}).items()}
        return kept | {"LLAMA_CPP_LIB_PATH": str(self.bin_dir)} | knobs


def stock_arm() -> Arm:
    return make_arm(STOCK, Knobs())


def make_arm(name: str, knobs: Knobs) -> Arm:
    if name in _STOCK_TYPES:
        return Arm(name, library.stock_dir(), None, _STOCK_TYPES[name])
    return Arm(name, library.patched_dir(), knobs.replace(mode=_MODES[name]))


def make_arms(names: str, given: Sequence[str], knobs: Knobs) -> list[Arm]:
    """Those of --arms, then those of --arm; every name and knob is checked before anything is looked for."""
    chosen = _parse_names(names)
    extra: dict[str, Knobs] = {}
    for text in given:
        name, changed = _parse_arm(text, knobs)
        if name in extra:
            raise UsageError(f"--arm {text}: there is an arm {name} already")
        extra[name] = changed
    if not chosen and not extra:
        raise UsageError("no arm to compare: name some with --arms or --arm")
    arms = [make_arm(name, knobs) for name in chosen]
    return arms + [Arm(name, library.patched_dir(), changed) for name, changed in extra.items()]


def _parse_names(text: str) -> list[str]:
    names = text.split(",") if text else []
    if len(set(names)) < len(names) or not set(names) <= set(ARMS):
        raise UsageError(f"--arms {text}: allowed is {', '.join(ARMS)}, each once")
    return names


def _parse_arm(text: str, knobs: Knobs) -> tuple[str, Knobs]:
    """NAME:knob=value,... on top of the knobs given for all."""
    name, _, pairs = text.partition(":")
    if not name or name in ARMS or not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--arm {text}: give NAME:knob=value,... with a name of its own, of letters, digits, - and _")
    values = {"mode": "paged"}
    for pair in filter(None, pairs.split(",")):
        knob, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--arm {text}: {pair} is not knob=value")
        try:
            spec = find_spec(knob.strip())
            values[spec.name] = spec.parse(value)
        except UsageError as error:
            raise UsageError(f"--arm {text}: {error}") from None
    return name, knobs.replace(**values)
