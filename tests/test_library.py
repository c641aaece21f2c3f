"""Finding and loading the patched library, on a stand-in whose functions only answer a number."""

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from monarch_llamacpp import builder_shim, builder_source, builder_stamp, info, library, paths
from monarch_llamacpp.builder_recipe import build_digest
from monarch_llamacpp.builder_stamp import Built, write_stamp
from monarch_llamacpp.cli import main
from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.pin import read_pin
from monarch_llamacpp.progress import Progress

LLAMA_H = "#include <stdint.h>\n#define LLAMA_API\ntypedef int32_t llama_seq_id;\nstruct llama_context;\n"
FUNCTION = re.compile(r"^[\w *]+\b(monarch_\w+) *\(", re.MULTILINE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MONARCH_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)
    library.load.cache_clear()
    yield tmp_path
    library.load.cache_clear()


@pytest.fixture
def make_library(cache: Path) -> Callable[[int], Path]:
    """Builds a patched arm whose libllama.so exports monarch.h, every function returning the ABI version given."""

    def make(abi: int) -> Path:
        arm_dir = cache / "patched-fake"
        for name, file in builder_source.own_files(paths.native_dir()).items():
            write(arm_dir / "src" / builder_source.NATIVE / name, file.read_text())
        write(arm_dir / "src/include/llama.h", LLAMA_H)
        names = FUNCTION.findall(builder_shim.declarations(paths.native_dir()))
        write(arm_dir / "stub.c", "".join(f"int {name}(void) {{ return {abi}; }}\n" for name in names))
        (arm_dir / "bin").mkdir()
        # a name for each version: the loader takes a library of the same name that it already holds
        output = arm_dir / f"bin/libllama.so.{abi}"
        command = ["cc", "-shared", "-fPIC", str(arm_dir / "stub.c"), f"-Wl,-soname,{output.name}", "-o", str(output)]
        subprocess.run(command, check=True)
        (arm_dir / "bin/libllama.so").symlink_to(output.name)
        builder_shim.ensure_shim(arm_dir, Progress())
        write_stamp(Built(arm_dir, build_digest("patched", read_pin()), ["llama"]))
        return arm_dir / "bin"

    return make


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_shim_speaks_to_the_library_beside_it(make_library: Callable[[int], Path]) -> None:
    folder = make_library(library.abi_version())
    module = library.load()
    assert module.lib.monarch_abi_version() == module.lib.MONARCH_ABI_VERSION == library.abi_version()
    assert os.environ["LLAMA_CPP_LIB_PATH"] == str(folder) == str(library.patched_dir())
    assert library.load() is module


def test_the_shim_is_compiled_once_and_again_when_the_header_changes(make_library: Callable[[int], Path]) -> None:
    shim = builder_stamp.shim_file(make_library(library.abi_version()))
    arm_dir = shim.parent.parent
    before = shim.stat().st_mtime_ns
    builder_shim.ensure_shim(arm_dir, Progress())
    assert shim.stat().st_mtime_ns == before
    header = arm_dir / "src" / builder_source.NATIVE / "monarch.h"
    header.write_text(header.read_text().replace("struct monarch_page {", "struct monarch_page { int32_t more;"))
    builder_shim.ensure_shim(arm_dir, Progress())
    assert shim.stat().st_mtime_ns != before


def test_a_shim_that_does_not_compile_names_its_log(make_library: Callable[[int], Path]) -> None:
    shim = builder_stamp.shim_file(make_library(library.abi_version()))
    (shim.parent.parent / "src/include/llama.h").write_text("#error broken\n")
    shim.unlink()
    with pytest.raises(MonarchError, match=r"did not compile; the full log is .*shim\.log"):
        builder_shim.ensure_shim(shim.parent.parent, Progress())
    assert not shim.exists()


def test_a_library_of_another_abi_names_both_numbers(make_library: Callable[[int], Path]) -> None:
    make_library(41)
    with pytest.raises(MonarchError, match=f"has ABI 41, this package needs {library.abi_version()}: run"):
        library.load()


def test_a_library_of_another_folder_already_imported_names_both(
    make_library: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_library(library.abi_version())
    imported = types.SimpleNamespace(_base_path=Path("/another/folder"))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", imported)
    with pytest.raises(MonarchError, match=f"/another/folder, not {folder}: import monarch_llamacpp.llama before"):
        library.load()
    assert "LLAMA_CPP_LIB_PATH" not in os.environ


def test_nothing_built_names_the_command(cache: Path) -> None:
    with pytest.raises(MonarchError, match="the patched library is not built: run python -m monarch_llamacpp build"):
        library.load()
    with pytest.raises(MonarchError, match="the stock library is not built: run python -m monarch_llamacpp build"):
        library.stock_dir()


def test_a_library_of_other_sources_is_refused(make_library: Callable[[int], Path]) -> None:
    arm_dir = make_library(library.abi_version()).parent
    write_stamp(Built(arm_dir, "of other sources", ["llama"]))
    with pytest.raises(MonarchError, match="was built from other sources, or for another CPU: run"):
        library.load()


def test_a_shim_for_another_python_is_not_enough(make_library: Callable[[int], Path]) -> None:
    builder_stamp.shim_file(make_library(library.abi_version())).unlink()
    with pytest.raises(MonarchError, match="is not built for this Python: run python -m monarch_llamacpp build"):
        library.load()


def test_a_damaged_shim_is_refused(make_library: Callable[[int], Path]) -> None:
    builder_stamp.shim_file(make_library(library.abi_version())).write_bytes(b"not a library")
    with pytest.raises(MonarchError, match="does not load .*: delete it and run"):
        library.load()


def test_info_names_the_folders_that_are_built(make_library: Callable[[int], Path], capsys) -> None:
    folder = make_library(library.abi_version())
    (folder / "libggml-base.so").touch()
    (folder / "libggml-cpu.so").touch()
    assert main(["info", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["patched"] == {"lib_dir": str(folder), "bin_dir": None, "tools": []}
    assert shown["stock"] == {"lib_dir": None, "bin_dir": None, "tools": []}
    assert shown["pin"]["llama_cpp_commit"] == read_pin().llama_cpp_commit
    assert shown["abi"] == library.abi_version()
    assert shown["backends"] == ["CPU"]
    assert main(["info"]) == 0
    assert f"patched.lib_dir: {folder}\n" in capsys.readouterr().out


def test_info_knows_which_tools_were_asked_for(cache: Path) -> None:
    arm_dir = cache / "stock-fake"
    (arm_dir / "bin").mkdir(parents=True)
    write_stamp(Built(arm_dir, build_digest("stock", read_pin()), ["llama", "llama-bench"]))
    assert info.collect()["stock"] == {
        "lib_dir": str(arm_dir / "bin"), "bin_dir": str(arm_dir / "bin"), "tools": ["llama-bench"]}


@pytest.mark.parametrize("command", [["info"], ["recall", "-o", "{folder}/a.gguf", "--text", "{folder}/a.txt"]])
@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_takes_is_status_1(tmp_path: Path, command: list[str], full: bool) -> None:
    """Into a pipe without a reader, or a full disk; held back until the end, as Python does where nobody watches."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w") as disk:
        argv = [sys.executable, "-m", "monarch_llamacpp", *(part.format(folder=tmp_path) for part in command)]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        result = subprocess.run(argv, stdout=disk if full else pipe, stderr=subprocess.PIPE, text=True, env=env)
    assert (result.returncode, "Exception" in result.stderr) == (1, False), result.stderr
    assert result.stderr.count("error: no space left on device") == full


def test_closed_streams_are_no_error(cache: Path) -> None:
    for redirect in ("2>&-", "<&- >&- 2>&-"):
        argv = ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, "-m", "monarch_llamacpp"]
        result = subprocess.run([*argv, "info", "--json"], stdout=subprocess.PIPE)
        assert result.returncode == 0 and bool(result.stdout) == (">&- 2" not in redirect)
        result = subprocess.run([*argv, "build", "--jobs", "0"], stdout=subprocess.PIPE)
        assert (result.returncode, result.stdout) == (2, b"")
