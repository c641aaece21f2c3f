"""A stand-in for the cffi extension that keeps knobs and returns what a test puts in: no build needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cffi

from monarch_llamacpp import builder_shim, paths

_API_MODE_ONLY = ("#define", 'extern "Python"')


def _declarations() -> str:
    lines = builder_shim.declarations(paths.native_dir()).splitlines()
    return "\n".join(line for line in lines if not line.startswith(_API_MODE_ONLY))


class FakeFfi:
    def __init__(self) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(_declarations())
        self.exported: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ffi, name)

    def def_extern(self, name: str) -> Any:
        def keep(function: Any) -> Any:
            self.exported[name] = self._ffi.callback("void(const struct monarch_event *, void *)", function)
            return function

        return keep


class FakeLibrary:
    """monarch.h on dictionaries; set fail to make every call fail with that message."""

    def __init__(self) -> None:
        self.ffi = FakeFfi()
        self.lib = self
        self.fail = ""
        self.current: dict[str, Any] = {}
        self.pending: list[dict[str, Any] | None] = []
        self.stats: dict[str, Any] = {}
        self.pages: list[tuple[int, int, int, int]] = []
        self.hooks: SimpleNamespace | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("monarch_py_"):
            return self.ffi.exported[name]
        raise AttributeError(name)

    def fire(self, name: str, **event: Any) -> None:
        struct = self.ffi.new("struct monarch_event *", event)
        getattr(self.hooks, name)(struct, self.hooks.user_data)

    def monarch_last_error(self) -> Any:
        self._message = self.ffi.new("char[]", self.fail.encode())
        return self._message

    def monarch_knobs_validate(self, knobs: Any) -> int:
        assert knobs.struct_size == self.ffi.sizeof("struct monarch_knobs")
        return self._result()

    def monarch_set_pending_knobs(self, knobs: Any) -> int:
        self.pending.append(None if knobs == self.ffi.NULL else self._values(knobs))
        if knobs != self.ffi.NULL:
            self.current = self._values(knobs)
        return 0

    def monarch_get_knobs(self, _ctx: Any, knobs: Any) -> int:
        for name, value in self.current.items():
            setattr(knobs, name, value)
        return self._result()

    def monarch_set_knobs(self, _ctx: Any, knobs: Any) -> int:
        self.current = self._values(knobs)
        return self._result()

    def monarch_get_stats(self, _ctx: Any, stats: Any) -> int:
        for name, value in self.stats.items():
            setattr(stats, name, value)
        return self._result()

    def monarch_get_pages(self, _ctx: Any, _seq_id: int, pages: Any, n_max: int) -> int:
        for i in range(min(n_max, len(self.pages))):
            pages[i].first_pos, pages[i].n_tokens, pages[i].n_promoted, pages[i].n_sticky = self.pages[i]
        return self._result() or len(self.pages)

    def monarch_set_hooks(self, _ctx: Any, hooks: Any) -> int:
        # the library copies the struct
        names = [name for name, _ in self.ffi.typeof("struct monarch_hooks").fields]
        is_null = hooks == self.ffi.NULL
        self.hooks = None if is_null else SimpleNamespace(**{name: getattr(hooks, name) for name in names})
        return self._result()

    def _values(self, knobs: Any) -> dict[str, Any]:
        return {name: getattr(knobs, name) for name, _ in self.ffi.typeof("struct monarch_knobs").fields}

    def _result(self) -> int:
        return -1 if self.fail else 0
