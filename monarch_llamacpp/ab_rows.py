"""The rows of an A/B comparison: kept in a file while it runs, taken from there by --resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import MonarchError
from .output_file import write_file

Row = dict[str, Any]

# what tells one row from another
_KEY = ("row", "arm", "control", "flash_attn", "n_depth", "n_prompt", "n_gen", "metric", "way", "length", "depth")


def _key(row: Row) -> tuple:
    return tuple(row.get(name) for name in _KEY)


class Rows:
    """Written to the file, if there is one, whenever rows come in."""

    def __init__(self, file: Path | None, earlier: Sequence[Row] = ()) -> None:
        self._file = file
        self._earlier = {_key(row): row for row in earlier if row["row"] != "failure"}
        self._rows: dict[tuple, Row] = {}

    def put(self, rows: Iterable[Row]) -> None:
        """A row replaces the one of the same key. Earlier rows stay in the file: their turn may not have come yet."""
        self._rows |= {_key(row): row for row in rows}
        self._write(self._earlier | self._rows)

    def finish(self) -> None:
        """Only what this run asked for stays in the file."""
        self._write(self._rows)

    def _write(self, rows: Mapping[tuple, Row]) -> None:
        if self._file:
            write_file(self._file, "".join(json.dumps(row) + "\n" for row in rows.values()))

    def take(self, kind: str, arm: str, receipt: str, asked: Callable[[Row], bool]) -> list[Row]:
        """Rows of an earlier run that still hold and are asked for."""
        found = [row for row in self._earlier.values() if (row["row"], row.get("arm")) == (kind, arm)]
        taken = [row for row in found if row.get("receipt") == receipt and asked(row)]
        self.put(taken)
        return taken

    def all(self) -> list[Row]:
        return list(self._rows.values())

    def of(self, kind: str) -> list[Row]:
        return [row for row in self._rows.values() if row["row"] == kind]


def read_rows(file: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise MonarchError(f"{file} cannot be continued ({error}): remove it") from None
    if not all(isinstance(row, dict) and "row" in row for row in rows):
        raise MonarchError(f"{file} is not an A/B comparison: give another file")
    return rows
