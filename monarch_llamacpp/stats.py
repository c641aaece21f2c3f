"""The statistics of a paged context, read from native/monarch-stats.def."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, make_dataclass
from functools import lru_cache
from typing import Any

from .errors import MonarchError
from .knobs import definitions, read_definitions
from .paths import native_dir

TYPES = {"U32": int, "MODE": str, "U64": int, "F64": float}

_LINE = re.compile(r'MONARCH_STAT_(?P<kind>\w+)\s*\(\s*(?P<name>[a-z][a-z0-9_]*)\s*,\s*"(?P<help>[^"]*)"\s*\)')


@dataclass(frozen=True)
class Stat:
    """What the .def says about one statistic."""

    name: str
    kind: str
    help: str


def parse_stats(text: str, origin: str = "monarch-stats.def") -> list[Stat]:
    """One Stat for every line; anything else but comments and empty lines is an error."""
    stats: dict[str, Stat] = {}
    for number, line in definitions(text):
        match = _LINE.fullmatch(line)
        if not match or match["kind"] not in TYPES or match["name"] in stats:
            raise MonarchError(f"{origin}:{number}: not a statistic, or defined twice: {line[:60]}")
        stats[match["name"]] = Stat(match["name"], match["kind"], match["help"])
    return list(stats.values())


@lru_cache(maxsize=1)
def stats() -> list[Stat]:
    """Every statistic, in the order of native/monarch-stats.def."""
    path = native_dir() / "monarch-stats.def"
    return parse_stats(read_definitions(path), str(path))


class _Sums:
    """What follows from the fields."""

    @property
    def kv_bytes(self) -> int:
        return self.hot_bytes + self.cold_bytes + self.summary_bytes + self.frame_bytes + self.table_bytes

    @property
    def n_places(self) -> int:
        """(layer, KV head) pairs, each of which promotes its own pages."""
        return max(1, self.n_layer * self.n_head_kv)

    def with_sums(self) -> dict[str, Any]:
        return asdict(self) | {"kv_bytes": self.kv_bytes, "n_places": self.n_places}


_DOC = "struct monarch_stats. kv_bytes: the bytes of all; n_places: (layer, KV head) pairs.\n\n"

Stats = make_dataclass(
    "Stats",
    [(stat.name, TYPES[stat.kind]) for stat in stats()],
    bases=(_Sums,),
    namespace={"__doc__": _DOC + "\n".join(f"{stat.name}: {stat.help}" for stat in stats()), "__module__": __name__},
    frozen=True,
)
