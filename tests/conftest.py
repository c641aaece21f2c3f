"""Fixtures for every test: the folders of the two builds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from monarch_llamacpp import library
from monarch_llamacpp.errors import MonarchError


def _built(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except MonarchError as error:
        pytest.fail(f"{error} --tools", pytrace=False)


@pytest.fixture(scope="session")
def stock_bin() -> Path:
    """Unmodified upstream: libraries and tools."""
    return _built(library.stock_dir)


@pytest.fixture(scope="session")
def patched_bin() -> Path:
    """The patched libraries and tools, and the shim."""
    return _built(library.patched_dir)
