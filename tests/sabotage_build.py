"""Copies of the patched build with something broken in its machine code, in a cache folder of their own.

A library is changed in the copy's file, so that the product needs no switch for it: a function returns at once, or a
table holds other numbers.
"""

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

from monarch_llamacpp import paths

_RETURN = {"x86_64": b"\xc3", "aarch64": b"\xc0\x03\x5f\xd6"}
MACHINE_IS_KNOWN = platform.machine() in _RETURN


def copy_build(bin_dir: Path, cache: Path) -> Path:
    """The CPU backend's library in a copy that is found when MONARCH_CACHE names the cache."""
    arm_dir = cache / bin_dir.parent.name
    shutil.copytree(bin_dir, arm_dir / "bin", symlinks=True)
    shutil.copy2(bin_dir.parent / "stamp.json", arm_dir)
    return (arm_dir / "bin" / "libggml-cpu.so").resolve()


def return_at_once(library: Path, name: str) -> None:
    """From every function whose mangled name contains this."""
    lines = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [int(line.split()[0], 16) for line in lines if re.search(rf" [tT] _Z\w*\d{name}", line)]
    assert found, f"{library} has no function {name}"
    content = bytearray(library.read_bytes())
    for address in found:
        offset = _file_offset(content, address)
        code = _RETURN[platform.machine()]
        content[offset : offset + len(code)] = code
    library.write_bytes(content)


def _file_offset(content: bytes, address: int) -> int:
    """ELF64: through the program headers."""
    (start,) = struct.unpack_from("<Q", content, 32)
    size, n = struct.unpack_from("<HH", content, 54)
    for i in range(n):
        kind, _, offset, virtual, _, length = struct.unpack_from("<IIQQQQ", content, start + i * size)
        if kind == 1 and virtual <= address < virtual + length:
            return address - virtual + offset
    raise AssertionError(f"nothing is loaded at {address:#x}")


def overwrite_table(library: Path, name: str) -> None:
    """A table of native/monarch-codec-tables.h becomes zeros."""
    text = (paths.native_dir() / "monarch-codec-tables.h").read_text().replace("\\\n", " ")
    (values,) = re.findall(rf"#define {name}\s+(.*)", text)
    numbers = [float(part.strip().rstrip("f")) for part in values.split(",")]
    wanted = struct.pack(f"<{len(numbers)}f", *numbers)
    content = library.read_bytes()
    assert wanted in content, f"{library} does not hold {name}"
    library.write_bytes(content.replace(wanted, bytes(len(wanted))))
