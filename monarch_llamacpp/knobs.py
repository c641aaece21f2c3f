"""The knobs of the paged KV cache, read from native/monarch-knobs.def."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import MonarchError, UsageError
from .paths import native_dir

Value = str | int | float

ENV_PREFIX = "MONARCH_"

_NUMBER = r"[-+]?[0-9][-+.eE0-9]*"
_HELP = r'"(?P<help>[^"]*)"\s*\)'
_LIVE = r"(?P<live>[01])\s*,\s*"
_NAME = r"\(\s*(?P<name>[a-z][a-z0-9_]*)\s*,\s*"
_ENUM_LINE = re.compile(
    rf'MONARCH_KNOB_ENUM\s*{_NAME}(?P<default>\w+)\s*,\s*"(?P<choices>\w+(?:\|\w+)*)"\s*,\s*{_LIVE}{_HELP}'
)
_NUMBER_LINE = re.compile(
    rf"MONARCH_KNOB_(?P<kind>INT|FLOAT)\s*{_NAME}(?P<default>{_NUMBER})\s*,\s*"
    rf"(?P<least>{_NUMBER})\s*,\s*(?P<greatest>{_NUMBER})\s*,\s*{_LIVE}{_HELP}"
)

# the .def can only say least and greatest; the C side knows these too
_ONLY: dict[str, tuple[int, ...]] = {
    "page_size": (8, 16, 32),
    "cold_bits_k": (2, 3, 4, 16),
    "cold_bits_v": (2, 3, 4, 16),
}


@dataclass(frozen=True)
class Spec:
    """What the .def says about one knob."""

    name: str
    type: type
    default: Value
    live: bool
    help: str
    choices: tuple[Value, ...] = ()
    least: float = 0
    greatest: float = 0

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def allowed(self) -> str:
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.least} to {self.greatest}"

    def parse(self, text: str) -> Value:
        """A value from the command line, the environment or /set."""
        try:
            value = self.type(text.strip())
        except ValueError:
            raise self._refusal(text) from None
        return self.check(value)

    def check(self, value: Any) -> Value:
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or not self._allows(value):
            raise self._refusal(value)
        return value

    def _allows(self, value: Value) -> bool:
        if self.choices:
            return value in self.choices
        return self.least <= value <= self.greatest

    def _refusal(self, value: Any) -> UsageError:
        return UsageError(f"{self.name} = {value}: allowed is {self.allowed}")


def parse_specs(text: str, origin: str = "monarch-knobs.def") -> dict[str, Spec]:
    """One Spec for every knob line; anything else but comments and empty lines is an error."""
    specs: dict[str, Spec] = {}
    for number, line in definitions(text):
        spec = _parse_line(line)
        if spec is None or spec.name in specs:
            raise MonarchError(f"{origin}:{number}: not a knob definition, or defined twice: {line[:60]}")
        specs[spec.name] = spec
    return specs


def definitions(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a .def that are neither comments nor empty, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("//"):
            yield number, line


def _parse_line(line: str) -> Spec | None:
    if match := _ENUM_LINE.fullmatch(line):
        choices = tuple(match["choices"].split("|"))
        return _consistent(Spec(match["name"], str, match["default"], match["live"] == "1", match["help"], choices))
    if match := _NUMBER_LINE.fullmatch(line):
        return _parse_number(match)
    return None


def _parse_number(match: re.Match[str]) -> Spec | None:
    kind = int if match["kind"] == "INT" else float
    try:
        default, least, greatest = (kind(match[part]) for part in ("default", "least", "greatest"))
    except ValueError:
        return None
    name = match["name"]
    only = _ONLY.get(name, ())
    return _consistent(Spec(name, kind, default, match["live"] == "1", match["help"], only, least, greatest))


def _consistent(spec: Spec) -> Spec | None:
    return spec if spec._allows(spec.default) else None


def read_definitions(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MonarchError(f"cannot read {path.name}: {error}: reinstall monarch_llamacpp") from None


def read_specs(path: Path) -> dict[str, Spec]:
    return parse_specs(read_definitions(path), str(path))


@lru_cache(maxsize=1)
def specs() -> dict[str, Spec]:
    """Every knob, in the order of native/monarch-knobs.def."""
    return read_specs(native_dir() / "monarch-knobs.def")


def find_spec(name: str) -> Spec:
    """The knob of that name; hot-window is hot_window."""
    name = name.replace("-", "_")
    if name not in specs():
        close = difflib.get_close_matches(name, specs(), 1)
        raise UsageError(f"no knob is named {name}: " + (f"did you mean {close[0]}?" if close else ", ".join(specs())))
    return specs()[name]


class Knobs(Mapping[str, Value]):
    """One validated, immutable set of knobs: Knobs(mode="paged", hot_window=256).hot_window is 256."""

    def __init__(self, **values: Value) -> None:
        chosen = {spec.name: spec.default for spec in specs().values()}
        for name, value in values.items():
            spec = find_spec(name)
            chosen[spec.name] = spec.check(value)
        object.__setattr__(self, "_values", chosen)

    def __getattr__(self, name: str) -> Value:
        # copy and pickle look attributes up before __init__ ran
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"no knob is named {name}")
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("Knobs do not change: use replace()")

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        changed = (f"{name}={self[name]!r}" for name in self if self[name] != specs()[name].default)
        return f"Knobs({', '.join(changed)})"

    def replace(self, **changes: Value) -> Knobs:
        return Knobs(**{**self, **changes})


def add_knob_arguments(parser: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """One option for every knob; those hidden are not listed, but parsed: a refusal can say more than argparse."""
    group = parser.add_argument_group("knobs of the paged KV cache")
    for spec in specs().values():
        metavar = "|".join(map(str, spec.choices)) if spec.choices else spec.type.__name__.upper()
        text = f"{spec.help} (default: {spec.default})".replace("%", "%%")
        shown = argparse.SUPPRESS if spec.name in hidden else text
        # what is given is validated by knobs_from_args: one line, the same as from the environment
        group.add_argument(spec.flag, dest=spec.name, metavar=metavar, help=shown)


def from_env(environ: Mapping[str, str] | None = None) -> Knobs:
    """The defaults, changed by MONARCH_HOT_WINDOW and the like."""
    environ = os.environ if environ is None else environ
    return Knobs(**{spec.name: _parse_env(spec, environ[spec.env]) for spec in specs().values() if spec.env in environ})


def _parse_env(spec: Spec, text: str) -> Value:
    try:
        return spec.parse(text)
    except UsageError as error:
        raise UsageError(f"environment variable {spec.env}: {error}") from None


def knobs_from_args(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Knobs:
    """The command line beats the environment, which beats the defaults."""
    given = {name: getattr(args, name, None) for name in specs()}
    parsed = {name: specs()[name].parse(text) for name, text in given.items() if text is not None}
    return from_env(environ).replace(**parsed)
