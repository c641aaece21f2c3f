"""llama-cpp-python's Llama on the patched library. Importing this module loads the library."""

from __future__ import annotations

import ctypes
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from . import library
from .checks import check_ctx_size, check_gpu_layers, check_model, check_threads
from .errors import MonarchError
from .knobs import Knobs, Value, find_spec
from .shim import Hook, Page, Shim
from .stats import Stats

_shim_module = library.load()

import llama_cpp  # noqa: E402  only after library.load() chose the library
from jinja2 import TemplateError  # noqa: E402
from llama_cpp._logger import llama_log_callback as _print_log  # noqa: E402

SHIM = Shim(_shim_module.ffi, _shim_module.lib)

_LOG_LEVEL_ERROR = 4

_last_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _user_data: Any) -> None:
    # llama-cpp-python 0.3.36 takes ERROR for DEBUG and drops exactly the lines that name a cause
    if level == _LOG_LEVEL_ERROR:
        _last_errors.append(text.decode("utf-8", "replace").strip())


def _cause() -> str:
    """The first error that llama.cpp logged, without the name of the function that logged it."""
    if not _last_errors:
        return "llama.cpp gives no reason"
    before, colon, after = _last_errors[0].partition(": ")
    cause = after if colon and " " not in before else _last_errors[0]
    return f"{cause}: use a smaller context" if "alloc" in cause else cause


class _Closed:
    def __getattr__(self, _name: str) -> NoReturn:
        raise MonarchError("the model is closed: open it again")


_CLOSED: Any = _Closed()


class Llama(llama_cpp.Llama):
    """Llama(path, paging=Knobs(mode="paged")); without paging the MONARCH_* environment decides.

    n_gpu_layers: the last layers and their cache lie on the GPU; -1: all, on a CUDA build.
    """

    def __init__(
        self, model_path: str, *, paging: Knobs | None = None, n_gpu_layers: int = -1, **kwargs: Any
    ) -> None:
        self._stack = ExitStack()  # the base class closes it even when it never opened
        if paging is not None:
            SHIM.validate(paging)
        check_model(Path(model_path))
        check_ctx_size("n_ctx", kwargs.get("n_ctx", 0))
        check_gpu_layers("n_gpu_layers", n_gpu_layers)
        for name in ("n_threads", "n_threads_batch"):
            check_threads(name, kwargs.get(name))
        self._hooks: Any = None
        self._paging = paging
        self._create(str(model_path), paging, kwargs | {"n_gpu_layers": n_gpu_layers})

    def _create(self, model_path: str, paging: Knobs | None, kwargs: dict[str, Any]) -> None:
        _last_errors.clear()
        llama_cpp.llama_log_set(_print_log if kwargs.get("verbose", True) else _keep_errors, None)
        SHIM.set_pending(paging)
        try:
            super().__init__(model_path, **kwargs)
        except (ValueError, RuntimeError, TemplateError) as error:
            raise MonarchError(f"cannot load {model_path}: {_reason(error)}") from error
        finally:
            SHIM.set_pending(None)

    def close(self) -> None:
        """Whatever is used afterwards says so: llama.cpp would read what was freed."""
        super().close()
        self._ctx = self._model = self.tokenizer_ = _CLOSED

    def stats(self) -> Stats:
        """What the paged cache holds and did; refused when paging is off."""
        return SHIM.stats(self.ctx)

    def pages(self, seq_id: int = 0) -> list[Page]:
        return SHIM.pages(self.ctx, seq_id)

    def knobs(self) -> Knobs:
        return SHIM.knobs(self.ctx)

    def set_knob(self, name: str, value: Value) -> None:
        """Changes a live knob; text is parsed as on the command line."""
        SHIM.set_knob(self.ctx, name, find_spec(name).parse(value) if isinstance(value, str) else value)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy, which open the model again: with these knobs."""
        try:
            paging: Knobs | None = self.knobs()
        except MonarchError:  # off
            paging = self._paging
        return super().__getstate__() | {"paging": paging}

    def get_sequence_state(self) -> bytes:
        """All that the cache holds of sequence 0, for set_sequence_state()."""
        _last_errors.clear()
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        data = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data(self.ctx, data, size, 0) != size:
            raise MonarchError(f"the state cannot be saved: {_cause()}")
        return bytes(data)

    def set_sequence_state(self, state: bytes) -> None:
        """Replaces what the cache holds; a state that does not fit changes nothing and raises MonarchError."""
        if not state:  # llama.cpp restores 0 bytes of it, which are all
            raise MonarchError("the state cannot be restored: it is empty")
        _last_errors.clear()
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if llama_cpp.llama_state_seq_set_data(self.ctx, data, len(state), 0) != len(state):
            raise MonarchError(f"the state cannot be restored: {_cause()}")

    def set_hooks(
        self, *, on_page_out: Hook = None, on_promote: Hook = None, on_sticky: Hook = None, on_page_in: Hook = None
    ) -> None:
        """Python functions called with an Event after each step; replaces all hooks set before."""
        hooks = {"on_page_out": on_page_out, "on_promote": on_promote, "on_sticky": on_sticky, "on_page_in": on_page_in}
        self._hooks = SHIM.set_hooks(self.ctx, hooks)


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return f"its chat template is broken: {error}"
    return SHIM.last_error() or _cause()
