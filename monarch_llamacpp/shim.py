"""native/monarch.h for Python: knobs, statistics, pages and hooks of a context. Loads nothing by itself."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .errors import MonarchError, UsageError
from .knobs import Knobs, Spec, Value, find_spec, specs
from .stats import Stats


@dataclass(frozen=True)
class Page:
    """A cold page; promoted and sticky count (layer, KV head) pairs."""

    first_pos: int
    n_tokens: int
    n_promoted: int
    n_sticky: int


@dataclass(frozen=True)
class Event:
    """What a hook is told. layer -1: all layers and KV heads together."""

    seq_id: int
    layer: int
    head_kv: int
    first_pos: int
    n_tokens: int
    estimated: float
    measured: float


Hook = Callable[[Event], None] | None

HOOKS = ("on_page_out", "on_promote", "on_sticky", "on_page_in")


def _read(kind: type, struct: Any) -> Any:
    return kind(**{field.name: getattr(struct, field.name) for field in fields(kind)})


def _to_c(spec: Spec, value: Value) -> Value:
    return spec.choices.index(value) if spec.type is str else value


def _from_c(spec: Spec, value: Any) -> Value:
    if spec.type is str:
        return spec.choices[value]
    # a C float of 0.92 is 0.9200000166893005
    return float(f"{value:.7g}") if spec.type is float else value


class Shim:
    """The functions of the cffi extension (ffi, lib) with Python's types. A context is its address."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi = ffi
        self._lib = lib
        for name in HOOKS:
            ffi.def_extern(name=f"monarch_py_{name}")(self._dispatcher(name))

    def validate(self, knobs: Knobs) -> None:
        """Refuses knobs that contradict each other."""
        if self._lib.monarch_knobs_validate(self._knobs(knobs)) < 0:
            raise UsageError(self.last_error())

    def set_pending(self, knobs: Knobs | None) -> None:
        """For the next context of this thread; None: the environment decides."""
        self._check(self._lib.monarch_set_pending_knobs(self._ffi.NULL if knobs is None else self._knobs(knobs)))

    def knobs(self, ctx: int) -> Knobs:
        struct = self._new("struct monarch_knobs")
        self._check(self._lib.monarch_get_knobs(self._context(ctx), struct))
        return Knobs(**{spec.name: _from_c(spec, getattr(struct, spec.name)) for spec in specs().values()})

    def set_knob(self, ctx: int, name: str, value: Value) -> None:
        """Changes a live knob of a context."""
        spec = find_spec(name)
        value = spec.check(value)
        if not spec.live:
            raise UsageError(f"{spec.name} needs a new context: start again with {spec.flag} {value}")
        struct = self._knobs(self.knobs(ctx).replace(**{spec.name: value}))
        self._check(self._lib.monarch_set_knobs(self._context(ctx), struct))

    def stats(self, ctx: int) -> Stats:
        struct = self._new("struct monarch_stats")
        self._check(self._lib.monarch_get_stats(self._context(ctx), struct))
        values = {field.name: getattr(struct, field.name) for field in fields(Stats)}
        values["mode"] = specs()["mode"].choices[struct.mode]
        return Stats(**values)

    def pages(self, ctx: int, seq_id: int = 0) -> list[Page]:
        """The cold pages of a sequence in order of position."""
        context = self._context(ctx)
        n_pages = self._check(self._lib.monarch_get_pages(context, seq_id, self._ffi.NULL, 0))
        table = self._ffi.new("struct monarch_page[]", max(1, n_pages))
        self._check(self._lib.monarch_get_pages(context, seq_id, table, n_pages))
        return [_read(Page, table[i]) for i in range(n_pages)]

    def set_hooks(self, ctx: int, hooks: dict[str, Hook]) -> Any:
        """Replaces the hooks of a context; the caller keeps the result alive until it replaces them again."""
        hooks = {name: hook for name, hook in hooks.items() if hook is not None}
        struct = self._new("struct monarch_hooks")
        handle = struct.user_data = self._ffi.new_handle(hooks)
        for name in hooks:
            setattr(struct, name, getattr(self._lib, f"monarch_py_{name}"))
        self._check(self._lib.monarch_set_hooks(self._context(ctx), struct if hooks else self._ffi.NULL))
        return handle

    def last_error(self) -> str:
        return self._ffi.string(self._lib.monarch_last_error()).decode("utf-8", "replace")

    def _dispatcher(self, name: str) -> Callable[[Any, Any], None]:
        def call(event: Any, user_data: Any) -> None:
            try:
                self._ffi.from_handle(user_data)[name](_read(Event, event))
            except BaseException:  # nothing may cross into C, not even an interrupt
                print(f"exception ignored in hook {name}:", file=sys.stderr)
                traceback.print_exc()

        return call

    def _knobs(self, knobs: Knobs) -> Any:
        struct = self._new("struct monarch_knobs")
        for name, value in knobs.items():
            setattr(struct, name, _to_c(specs()[name], value))
        return struct

    def _new(self, name: str) -> Any:
        struct = self._ffi.new(name + " *")
        struct.struct_size = self._ffi.sizeof(name)
        return struct

    def _context(self, ctx: int) -> Any:
        return self._ffi.cast("struct llama_context *", ctx)

    def _check(self, result: int) -> int:
        if result < 0:
            raise MonarchError(self.last_error())
        return result
