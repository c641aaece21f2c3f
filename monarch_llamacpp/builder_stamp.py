"""What is built: each build tree carries a stamp, written last."""

import dataclasses
import json
import os
import sysconfig
from pathlib import Path

from . import builder_recipe
from .pin import Pin

SHIM_MODULE = "_monarch_shim"


@dataclasses.dataclass(frozen=True)
class Built:
    """A build tree in the cache, as its stamp describes it."""

    arm_dir: Path
    digest: str  # empty while its bin folder is being replaced
    targets: list[str]
    cuda: str = ""  # the architectures that it was built for

    @property
    def bin_dir(self) -> Path:
        return self.arm_dir / "bin"


def shim_file(bin_dir: Path) -> Path:
    """The Python shim beside a library, for this Python: others keep theirs in the same folder."""
    return bin_dir / f"{SHIM_MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def read_stamp(arm_dir: Path) -> Built:
    try:
        stamp = json.loads((arm_dir / "stamp.json").read_text())
        return Built(arm_dir, stamp["digest"], stamp["targets"], stamp.get("cuda", ""))
    except (OSError, ValueError, KeyError):
        return Built(arm_dir, "", [])


def write_stamp(built: Built) -> None:
    temp = built.arm_dir / "stamp.tmp"
    temp.write_text(json.dumps({"digest": built.digest, "targets": built.targets, "cuda": built.cuda}))
    os.replace(temp, built.arm_dir / "stamp.json")


def find_built(arm: str, cache: Path, pin: Pin) -> Built | None:
    """The finished build of just these sources for this CPU; of several the one last asked for, CUDA or not."""
    stamps = sorted(cache.glob(f"{arm}-*/stamp.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    found = map(read_stamp, (file.parent for file in stamps))
    return next((built for built in found if built.digest == builder_recipe.build_digest(arm, pin, built.cuda)), None)
