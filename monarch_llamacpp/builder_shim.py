"""Compiles the cffi shim: native/monarch.h as the extension module _monarch_shim, beside the patched library."""

import os
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import cffi
import cffi.recompiler

from . import builder_cmake, builder_source
from .builder_stamp import SHIM_MODULE, shim_file
from .errors import MonarchError
from .progress import Progress

# what monarch.h takes from llama.h
_LLAMA_TYPES = "typedef int32_t llama_seq_id;\nstruct llama_context;\n"

_MACRO = re.compile(r"#define (MONARCH_(?:KNOB|STAT)_\w+)\(name, \.\.\.\) +(.*)")
_INCLUDE = re.compile(r'#include "(monarch[\w.-]*)"')
_CONSTANT = re.compile(r"#define (MONARCH_\w+) +\S+")
_FIELD = re.compile(r"^(MONARCH_(?:KNOB|STAT)_\w+) *\((\w+),", re.MULTILINE)
_HOOK = re.compile(r"^ *monarch_hook +(\w+);", re.MULTILINE)
_C_PLUS_PLUS = re.compile(r"^#ifdef __cplusplus\n.*?^#endif\n", re.MULTILINE | re.DOTALL)


def declarations(native: Path) -> str:
    """monarch.h as cffi reads it: preprocessed, and with one Python callback for each kind of hook."""
    header = _preprocess("monarch.h", native)
    hooks = [f'extern "Python" void monarch_py_{name}(const struct monarch_event *, void *);'
             for name in _HOOK.findall(header)]
    return _LLAMA_TYPES + "\n".join([header, *hooks]) + "\n"


def _preprocess(name: str, native: Path) -> str:
    text = _C_PLUS_PLUS.sub("", (native / name).read_text())
    macros = dict(_MACRO.findall(text))
    return "\n".join(_declaration(line, macros, native) for line in text.splitlines())


def _declaration(line: str, macros: dict[str, str], native: Path) -> str:
    if included := _INCLUDE.fullmatch(line):
        return _include(included[1], macros, native)
    if constant := _CONSTANT.fullmatch(line):
        return f"#define {constant[1]} ..."
    return "" if line.startswith("#") else line.replace("LLAMA_API ", "")


def _include(name: str, macros: dict[str, str], native: Path) -> str:
    if name.endswith(".def"):
        return _expand_fields((native / name).read_text(), macros)
    return _preprocess(name, native)


def _expand_fields(text: str, macros: dict[str, str]) -> str:
    return "\n".join(re.sub(r"\bname\b", name, macros[macro]) for macro, name in _FIELD.findall(text))


def ensure_shim(arm_dir: Path, progress: Progress) -> None:
    """Compiles the shim unless the one there came from the same text. A new library starts without any."""
    target = shim_file(arm_dir / "bin")
    source = arm_dir / f"{target.name}.c"
    text = c_source(arm_dir / "src" / builder_source.NATIVE)
    if target.is_file() and source.is_file() and source.read_text() == text:
        return
    progress.step("patched: compiling the Python shim")
    target.unlink(missing_ok=True)  # an interrupted run leaves none rather than an old one
    source.write_text(text)
    compile_shim(source, target, arm_dir)


def c_source(native: Path) -> str:
    ffi = cffi.FFI()
    ffi.cdef(declarations(native))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "shim.c")
        cffi.recompiler.make_c_source(ffi, SHIM_MODULE, '#include "monarch.h"', str(file))
        return file.read_text()


def compile_shim(source: Path, target: Path, arm_dir: Path) -> None:
    src = arm_dir / "src"
    includes = [sysconfig.get_path("include"), src / builder_source.NATIVE, src / "include", src / "ggml" / "include"]
    temp = target.with_suffix(".tmp")
    command = [*builder_cmake.find_compiler("CC", "cc"), "-O2", "-shared", "-fPIC", str(source), "-o", str(temp)]
    command += [f"-I{folder}" for folder in includes]
    command += [f"-L{target.parent}", "-lllama", "-Wl,-rpath,$ORIGIN"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        log = arm_dir / "shim.log"
        log.write_text(result.stdout)
        raise MonarchError(f"the Python shim did not compile; the full log is {log}")
    os.replace(temp, target)
