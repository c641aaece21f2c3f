"""Fixtures for every test: the folders of the two builds."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from monarch_llamacpp import builder_recipe, library
from monarch_llamacpp.errors import MonarchError


def pytest_configure() -> None:
    """A job in a script's background starts with SIGINT ignored, and its children with it; some are sent one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _built(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except MonarchError as error:
        pytest.fail(f"{error} --tools", pytrace=False)


@pytest.fixture(scope="session")
def stock_bin() -> Path:
    """Unmodified upstream: libraries and tools."""
    return _built(library.stock_dir)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitizer", choices=builder_recipe.SANITIZERS, help="test the library that was built with it")


@pytest.fixture(scope="session")
def sanitizer(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--sanitizer") or ""


@pytest.fixture(scope="session")
def patched_bin(sanitizer: str) -> Path:
    """The patched libraries and tools, and the shim; instrumented, without tools and shim."""
    return _built(lambda: library.sanitized_dir(sanitizer)) if sanitizer else _built(library.patched_dir)
