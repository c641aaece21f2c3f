"""The build pipeline, on a source of four small files: nothing here compiles llama.cpp."""

import errno
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from fake_source import PATCHED, TOP, UPSTREAM, write_patches, write_sdist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from monarch_llamacpp import (
    __version__,
    build,
    builder_cmake,
    builder_cuda,
    builder_patch,
    builder_recipe,
    builder_shim,
    builder_source,
    cli,
    paths,
)
from monarch_llamacpp.builder_recipe import NO_CUDA, Cuda
from monarch_llamacpp.builder_stamp import Built, find_built
from monarch_llamacpp.cli import main
from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.pin import read_pin
from monarch_llamacpp.progress import Progress

ROOT = Path(__file__).resolve().parent.parent


def _import_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh_patches = _import_script("refresh_patches")


def read(path: str) -> bytes:
    return UPSTREAM[path]


# pin


def test_the_pin_names_one_sdist_and_the_bindings_that_fit_it() -> None:
    pin = read_pin()
    assert pin.sdist == f"llama_cpp_python-{pin.llama_cpp_python}.tar.gz"
    assert f'"llama-cpp-python=={pin.llama_cpp_python}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("old", "new"), [
    ("sha256 = ", "sha256 = 0"),
    ("sdist = ", "sdist = ../"),
    ("sha256 = ", "sha265 = "),
    ("sdist = ", "sdist: "),
])
def test_a_damaged_pin_is_refused(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "LLAMA_CPP_VERSION"
    file.write_text(paths.pin_file().read_text().replace(old, new))
    with pytest.raises(MonarchError, match="LLAMA_CPP_VERSION"):
        read_pin(file)


# sdist


def test_another_sdist_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fake.tar.gz"
    pin = write_sdist(file)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(MonarchError, match="is not the pinned"):
        builder_source.ensure_upstream(pin, tmp_path, file)
    assert not builder_source.upstream_dir(pin, tmp_path).exists()


def test_a_download_is_kept_in_one_cache_and_its_failure_named(tmp_path: Path, monkeypatch) -> None:
    commands = []

    def fail(command: list[str], **_options: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "ERROR: no network")

    monkeypatch.setattr(builder_source.subprocess, "run", fail)
    with pytest.raises(MonarchError, match=r"ERROR: no network\): check the network, or .* --sdist FILE"):
        builder_source.ensure_sdist(read_pin(), tmp_path, None)
    [command] = commands
    assert {"--no-cache-dir", "--require-hashes"} <= set(command)


def test_only_the_vendored_source_is_unpacked_and_not_its_gitlink(tmp_path: Path) -> None:
    pin = write_sdist(tmp_path / "fake.tar.gz")
    upstream = builder_source.ensure_upstream(pin, tmp_path, None)
    found = {file.relative_to(upstream).as_posix(): file.read_bytes() for file in upstream.rglob("*") if file.is_file()}
    assert found == UPSTREAM


@pytest.mark.parametrize("name", [f"{TOP}/vendor/llama.cpp/../../../../escape", "/escape"])
def test_a_member_that_would_escape_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "fake.tar.gz"
    pin = write_sdist(file, {name: b"x"})
    with pytest.raises(MonarchError, match="unsafe member"):
        builder_source.ensure_upstream(pin, tmp_path / "cache", file)
    assert not list(tmp_path.rglob("escape"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_or_special_member_is_refused(tmp_path: Path, kind: bytes) -> None:
    file = tmp_path / "fake.tar.gz"
    info = tarfile.TarInfo(f"{TOP}/vendor/llama.cpp/link")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(info)
    with pytest.raises(MonarchError, match="unsafe member"):
        builder_source.extract(file, tmp_path)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fake.tar.gz"
    write_sdist(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(MonarchError, match="not a readable archive"):
        builder_source.extract(file, tmp_path / "out")


def test_an_interrupted_extraction_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = write_sdist(tmp_path / "fake.tar.gz")
    with monkeypatch.context() as patch:
        patch.setattr(builder_source.shutil, "copyfileobj", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            builder_source.ensure_upstream(pin, tmp_path, None)
    assert not builder_source.upstream_dir(pin, tmp_path).exists()
    upstream = builder_source.ensure_upstream(pin, tmp_path, None)
    assert (upstream / "src/a.cpp").read_bytes() == UPSTREAM["src/a.cpp"]
    assert not (tmp_path / "upstream.tmp").exists()


def raise_interrupt(*_args: object) -> None:
    raise KeyboardInterrupt


# patches


LINES = st.lists(st.sampled_from([b"", b"a", b"b", b"-- a/f", b"++ b/f", b"@@ -1 +1 @@", b"c\r", b"d\re"]), max_size=30)


@settings(deadline=None, max_examples=50)
@given(LINES, LINES, st.sampled_from([b"", b"no newline"]))
def test_what_git_diffs_is_applied_to_the_byte(old: list[bytes], new: list[bytes], last: bytes) -> None:
    before, after = (b"".join(line + b"\n" for line in text) for text in (old, new + [b"more"]))
    after += last
    assume(before != after)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "old"), Path(folder, "new")
        files[0].write_bytes(before)
        files[1].write_bytes(after)
        hunks = refresh_patches.hunks(*files)
    patch = builder_patch.parse_patch("p", b"why\n--- a/f\n+++ b/f\n" + hunks)
    assert patch.header == b"why\n"
    assert builder_patch.apply_file("p", patch.files[0], before) == after


def test_patches_apply_and_match_their_sums(tmp_path: Path) -> None:
    assert builder_patch.apply_patches(write_patches(tmp_path / "patches"), read) == PATCHED


def test_a_patch_for_another_source_is_refused(tmp_path: Path) -> None:
    folder = write_patches(tmp_path / "patches")
    with pytest.raises(MonarchError, match=r"src/a\.cpp:\d+ is not what the patch expects"):
        builder_patch.apply_patches(folder, lambda path: b"zero\n" + read(path))


def test_a_result_that_differs_from_its_sum_is_refused(tmp_path: Path) -> None:
    folder = write_patches(tmp_path / "patches")
    edit(folder / "0001-fake.patch", "+ours", "+yours")
    with pytest.raises(MonarchError, match=r"src/a\.cpp: the patched file does not match"):
        builder_patch.apply_patches(folder, read)


def test_a_sum_without_its_patch_is_refused(tmp_path: Path) -> None:
    folder = write_patches(tmp_path / "patches")
    with (folder / builder_patch.SUMS).open("a") as sums:
        sums.write(f"{'0' * 64}  src/b.cpp\n")
    with pytest.raises(MonarchError, match=r"src/b\.cpp: the patched file does not match"):
        builder_patch.apply_patches(folder, read)


def test_upstream_lines_go_only_when_listed(tmp_path: Path) -> None:
    patched = {"src/a.cpp": b"one\ntwo\nTHREE\nfour\nfive\n"}
    folder = write_patches(tmp_path / "patches", patched)
    with pytest.raises(MonarchError, match=r"does not allow: src/a\.cpp: three"):
        builder_patch.apply_patches(folder, read)
    (folder / builder_patch.REMOVED).write_text("src/a.cpp: three\n")
    assert builder_patch.apply_patches(folder, read) == patched


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("0001-fake.patch", "--- a/src/a.cpp", "--- /dev/null", "new files belong in native"),
    ("0001-fake.patch", " five\n", "", "cut short"),
    ("series", "    src/a.cpp\n", "", "not the files that series lists"),
    ("series", "0001-fake.patch", "0002-fake.patch", "differ"),
    ("series", "    src/a.cpp\n", "    src/a.cpp\n    src/a.cpp\n", "exactly one patch"),
])
def test_a_damaged_series_is_refused(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    folder = write_patches(tmp_path / "patches")
    edit(folder / file, old, new)
    with pytest.raises(MonarchError, match=message):
        builder_patch.apply_patches(folder, read)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_each_real_patch_says_why_it_exists_and_removes_only_what_is_listed() -> None:
    folder = paths.patches_dir()
    patches = builder_patch.read_patches(folder)
    builder_patch.check_removed_lines(folder, patches)
    assert [patch.name for patch in patches if not patch.header.strip()] == []


# source trees


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    builder_source.sync_tree(tree, {"same": b"1", "changed": b"1", "gone/x": b"1"})
    for name in ("same", "changed"):
        os.utime(tree / name, (1, 1))
    builder_source.sync_tree(tree, {"same": b"1", "changed": b"2", "new/y": b"1"})
    assert (tree / "same").stat().st_mtime == 1
    assert (tree / "changed").stat().st_mtime > 1
    assert {file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file()} == {
        "same", "changed", "new/y"}


def test_a_patched_file_that_goes_back_to_upstreams_text_is_new_to_ninja(tmp_path: Path) -> None:
    upstream = tmp_path / "old.cpp"
    upstream.write_bytes(b"upstream")
    os.utime(upstream, (1, 1))
    tree = tmp_path / "tree"
    tree.mkdir()
    builder_source.sync_tree(tree, {"a.cpp": b"patched"})
    before = (tree / "a.cpp").stat().st_mtime_ns
    builder_source.sync_tree(tree, {"a.cpp": upstream})
    assert (tree / "a.cpp").stat().st_mtime_ns >= before


def test_native_is_copied_without_litter(tmp_path: Path) -> None:
    for name in ("a.cpp", "cuda/b.cu", ".a.cpp.swp", "a.cpp~", "__pycache__/c.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(builder_source.own_files(tmp_path)) == ["a.cpp", "cuda/b.cu"]


# the whole build, with cmake and ninja replaced


class FakeCompiler:
    """Stands in for configure() and compile_targets(): counts, and writes one file for each target."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def configure(self, _runner: object, _tools: object, arm_dir: Path, _options: object) -> None:
        (arm_dir / "build/bin").mkdir(parents=True, exist_ok=True)

    def compile_targets(self, _runner: object, _tools: object, arm_dir: Path, targets: list[str], _jobs: int) -> None:
        self.compiled.append(arm_dir.name.partition("-")[0])
        source = (arm_dir / "src/src/a.cpp").read_bytes()
        for target in targets:
            (arm_dir / "build/bin" / f"{target}.so").write_bytes(source)


class Project:
    def __init__(self, root: Path) -> None:
        self.cache = root / "cache"
        self.cache.mkdir()
        self.pin = write_sdist(self.cache / "fake.tar.gz")
        self.native = root / "native"
        self.native.mkdir()
        (self.native / "monarch.cpp").write_text("first")
        write_patches(root / "patches")

    def build(self, *arms: str, tools: bool = False, compiler: str = "cc 1", cuda: Cuda = NO_CUDA) -> list[Built]:
        targets = [builder_recipe.LIBRARY, *(builder_recipe.TOOLS if tools else ())]
        progress = Progress()
        with build.build_lock(self.cache, progress) as lock:
            toolchain = builder_cmake.Toolchain("cmake", "ninja", compiler, cuda)
            builder = build.Builder(self.cache, self.pin, None, toolchain, 1, progress, lock)
            return [builder.build(arm, targets) for arm in arms]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(builder_cmake, "configure", fake.configure)
    monkeypatch.setattr(builder_cmake, "compile_targets", fake.compile_targets)
    monkeypatch.setattr(builder_shim, "ensure_shim", lambda *_: None)
    return fake


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path)
    return Project(tmp_path)


def test_both_arms_are_built_once(project: Project, compiler: FakeCompiler) -> None:
    patched, stock = project.build("patched", "stock")
    assert (patched.bin_dir / "llama.so").read_bytes() == PATCHED["src/a.cpp"]
    assert (stock.bin_dir / "llama.so").read_bytes() == UPSTREAM["src/a.cpp"]
    assert (patched.arm_dir / "src/monarch/monarch.cpp").read_text() == "first"
    assert not (stock.arm_dir / "src/monarch").exists()
    assert not (stock.arm_dir / "src/docs").exists()
    project.build("patched", "stock")
    assert compiler.compiled == ["patched", "stock"]


def test_a_sanitizer_builds_the_patched_sources_in_its_own_tree(project: Project, compiler: FakeCompiler) -> None:
    patched, *instrumented = project.build("patched", *builder_recipe.SANITIZERS)
    for built, sanitizer in zip(instrumented, builder_recipe.SANITIZERS, strict=True):
        assert built.arm_dir != patched.arm_dir and find_built(sanitizer, project.cache, project.pin) == built
        assert (built.bin_dir / "llama.so").read_bytes() == PATCHED["src/a.cpp"]
        options = builder_recipe.cmake_options(sanitizer, project.pin)
        assert {f"{lib}_SANITIZE_{sanitizer.upper()}" for lib in ("LLAMA", "GGML")} <= options.keys()


def test_an_edit_of_native_rebuilds_the_same_patched_tree_only(project: Project, compiler: FakeCompiler) -> None:
    before, _ = project.build("patched", "stock")
    (project.native / "monarch.cpp").write_text("second")
    assert find_built("patched", project.cache, project.pin) is None
    after, _ = project.build("patched", "stock")
    assert compiler.compiled == ["patched", "stock", "patched"]
    assert after.arm_dir == before.arm_dir
    assert (after.arm_dir / "src/monarch/monarch.cpp").read_text() == "second"


def test_tools_once_built_stay_with_their_library(project: Project, compiler: FakeCompiler) -> None:
    project.build("patched")
    [built] = project.build("patched", tools=True)
    assert compiler.compiled == ["patched", "patched"]
    (project.native / "monarch.cpp").write_text("second")
    [built] = project.build("patched")
    assert set(built.targets) == {builder_recipe.LIBRARY, *builder_recipe.TOOLS}


def test_a_build_interrupted_while_installing_is_not_found_and_completes(
    project: Project, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.build("patched", tools=True)
    (project.native / "monarch.cpp").write_text("second")
    with monkeypatch.context() as patch:
        patch.setattr(builder_cmake.os, "replace", raise_interrupt_at("llama.so"))
        with pytest.raises(KeyboardInterrupt):
            project.build("patched")
    (project.native / "monarch.cpp").write_text("first")  # what the stamp said before
    assert find_built("patched", project.cache, project.pin) is None
    [built] = project.build("patched")
    assert set(built.targets) == {builder_recipe.LIBRARY, *builder_recipe.TOOLS}
    assert not list(built.bin_dir.glob("*.tmp"))


def raise_interrupt_at(name: str):
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.name == name:
            raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def test_a_half_written_tree_is_completed(project: Project, compiler: FakeCompiler, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(builder_cmake, "configure", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            project.build("stock")
    [arm_dir] = project.cache.glob("stock-*")
    (arm_dir / "src/src/a.cpp").write_bytes(b"one\ntw")
    [built] = project.build("stock")
    assert (built.bin_dir / "llama.so").read_bytes() == UPSTREAM["src/a.cpp"]


def test_what_went_missing_is_built_again(project: Project, compiler: FakeCompiler) -> None:
    [built] = project.build("stock")
    (built.bin_dir / "llama.so").unlink()
    project.build("stock")
    assert (built.bin_dir / "llama.so").read_bytes() == UPSTREAM["src/a.cpp"]
    shutil.rmtree(built.arm_dir / "build")
    project.build("stock")
    assert compiler.compiled == ["stock", "stock"], "what is installed needs no build tree"
    shutil.rmtree(built.bin_dir)
    project.build("stock")
    assert (built.bin_dir / "llama.so").read_bytes() == UPSTREAM["src/a.cpp"]


def test_a_library_for_another_cpu_is_not_used(project: Project, compiler: FakeCompiler, monkeypatch) -> None:
    [here] = project.build("stock")
    monkeypatch.setattr(builder_recipe, "cpu_features", lambda: "another")
    assert find_built("stock", project.cache, project.pin) is None
    [there] = project.build("stock")
    assert here.arm_dir != there.arm_dir


def test_another_compiler_has_its_own_tree_and_the_last_asked_for_is_used(project: Project, compiler) -> None:
    [one] = project.build("stock")
    [two] = project.build("stock", compiler="cc 2")
    assert one.arm_dir != two.arm_dir
    assert find_built("stock", project.cache, project.pin) == two
    project.build("stock")
    assert find_built("stock", project.cache, project.pin) == one
    assert compiler.compiled == ["stock", "stock"]


def test_what_installing_replaces_stays_with_those_who_use_it(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    (built / "lib.so.0").write_text("new")
    (built / "lib.so").symlink_to("lib.so.0")
    target = tmp_path / "bin"
    target.mkdir()
    (target / "lib.so.0").write_text("old")
    (target / "stale.so").write_text("old")
    with (target / "lib.so.0").open() as in_use:
        builder_cmake.install(built, target)
        assert in_use.read() == "old"
    assert (target / "lib.so").read_text() == "new"
    assert sorted(file.name for file in target.iterdir()) == ["lib.so", "lib.so.0"]


def test_a_second_build_waits(tmp_path: Path) -> None:
    waiting, entered = threading.Event(), threading.Event()

    class Watch(Progress):
        def step(self, text: str) -> None:
            assert "waiting for another build" in text
            waiting.set()

    def second() -> None:
        with build.build_lock(tmp_path, Watch()):
            entered.set()

    thread = threading.Thread(target=second)
    with build.build_lock(tmp_path, Progress()):
        thread.start()
        assert waiting.wait(60)
        assert not entered.is_set()
    thread.join(60)
    assert entered.is_set()


# commands it runs


@pytest.fixture
def runner(tmp_path: Path):
    with build.build_lock(tmp_path, Progress()) as lock:
        yield builder_cmake.Runner(tmp_path / "build.log", Progress(), lock)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_a_tree_that_was_moved_is_configured_anew(runner, tmp_path: Path) -> None:
    tools = builder_cmake.Toolchain(builder_cmake._find_tool("cmake"), builder_cmake._find_tool("ninja"), "cc")
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "src").mkdir(parents=True)
    (here / "src" / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.18)\nproject(nothing NONE)\n")
    builder_cmake.configure(runner, tools, here, {})
    (here / "build" / "object").touch()
    builder_cmake.configure(runner, tools, here, {})
    assert (here / "build" / "object").exists()
    here.rename(there)
    builder_cmake.configure(runner, tools, there, {})
    assert (there / "build" / "build.ninja").exists() and not (there / "build" / "object").exists()


def test_a_failed_command_shows_its_last_lines_and_names_the_log(runner, capsys) -> None:
    with pytest.raises(MonarchError, match=f"compiling failed; the full log is {runner.log}"):
        runner.run("compiling", shell("seq 100; exit 1"), runner.log.parent)
    shown = capsys.readouterr().err.split()
    assert shown[-1] == "100"
    assert "1" not in shown
    assert "1" in runner.log.read_text().split()


def test_a_command_without_disk_space_says_so(runner) -> None:
    with pytest.raises(MonarchError, match="no space left on device; .*MONARCH_CACHE"):
        runner.run("compiling", shell("echo as: No space left on device; exit 1"), runner.log.parent)


def test_progress_is_sparse_where_lines_cannot_be_updated(runner, capsys) -> None:
    runner.run("compiling", shell('for i in $(seq 200); do echo "[$i/200] x"; done'), runner.log.parent)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 11
    assert lines[-1] == "compiling: 200/200"


def test_an_interrupt_ends_the_command(runner, monkeypatch) -> None:
    monkeypatch.setattr(runner.progress, "count", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run("compiling", shell('echo "[1/2] $$"; exec sleep 1000'), runner.log.parent)
    pid = int(runner.log.read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_command_sees_no_surrounding_repository(runner) -> None:
    subprocess.run(["git", "init", "-q", str(runner.log.parent)], check=True)
    inside = runner.log.parent / "arm" / "src"
    inside.mkdir(parents=True)
    with pytest.raises(MonarchError):
        runner.run("git", ["git", "-C", str(inside), "rev-parse", "--git-dir"], inside.parent)


# what a user sees


def command_line(capsys, *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return tmp_path / "cache"


def test_no_compiler_is_one_line(empty_cache: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, err = command_line(capsys, "build")
    assert status == 1
    assert err == ("error: no compiler: CXX is 'no-such-compiler', which is not on PATH; install one "
                   "(Debian and Ubuntu: apt install build-essential)\n")


def test_no_python_headers_is_one_line(empty_cache: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: sys.prefix if name == "scripts" else "/nowhere")
    status, err = command_line(capsys, "build")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: Python.h is missing in /nowhere: ")


def test_too_little_space_is_noticed_before_the_build(empty_cache: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: FreeSpace)
    status, err = command_line(capsys, "build")
    assert status == 1
    assert err.startswith("error: ") and "1 MB free, a build needs 400 MB" in err and err.count("\n") == 1
    assert sorted(file.name for file in empty_cache.iterdir()) == ["lock"]


def test_an_arm_beside_the_unpacked_source_needs_less_space(empty_cache: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: FreeSpace)
    builder_source.upstream_dir(read_pin(), empty_cache).mkdir(parents=True)
    assert "1 MB free, a build needs 140 MB" in command_line(capsys, "build")[1]


class FreeSpace:
    free = 1 << 20


def test_a_full_disk_is_one_line(empty_cache: Path, capsys, monkeypatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")

    monkeypatch.setattr(builder_source, "ensure_upstream", full)
    status, err = command_line(capsys, "build")
    assert status == 1
    assert err.splitlines()[-1] == ("error: no space left on device: /some/file; free some, "
                                    "or point MONARCH_CACHE to another disk")


def test_a_cache_that_cannot_be_is_one_line(empty_cache: Path, capsys) -> None:
    empty_cache.write_text("a file")
    status, err = command_line(capsys, "build")
    assert status == 1
    assert err == f"error: {empty_cache}: File exists: point MONARCH_CACHE to a folder that can be written to\n"


def test_another_sdist_is_one_line(empty_cache: Path, capsys, tmp_path: Path) -> None:
    (tmp_path / "other.tar.gz").write_bytes(b"x")
    status, err = command_line(capsys, "build", "--sdist", str(tmp_path / "other.tar.gz"))
    assert status == 1
    assert "is not the pinned" in err and err.count("\n") == 1
    status, err = command_line(capsys, "build", "--sdist", str(tmp_path / "missing.tar.gz"))
    assert status == 1
    assert "No such file or directory" in err and err.count("\n") == 1


def test_an_interrupt_is_status_130(empty_cache: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(builder_cmake, "find_toolchain", raise_interrupt)
    assert command_line(capsys, "build") == (130, "interrupted\n")


# CUDA


def write_tool(folder: Path, name: str, output: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like CUDA 13 in full, the only one on PATH, and a card."""
    root = tmp_path / "cuda"
    write_tool(root / "bin", "nvcc", f"#$ TOP={root}/bin/..\nCuda compilation tools, release 13.0, V13.0.88")
    write_tool(root / "bin", "nvidia-smi", "8.6\n12.0\n8.6")
    for name in ("include/cublas_v2.h", "include/cccl/cub/cub.cuh", "lib64/stubs/libcuda.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setenv("PATH", f"{root / 'bin'}:/usr/bin:/bin")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return root


def test_cuda_is_built_for_the_cards_present_or_those_asked_for(toolkit: Path) -> None:
    assert builder_cuda.find_cuda(None).architectures == "120;86"
    cuda = builder_cuda.find_cuda("75,90a")
    assert cuda.options["CMAKE_CUDA_ARCHITECTURES"] == cuda.architectures == "75;90a"
    assert cuda.options["CMAKE_CUDA_COMPILER"] == str(toolkit / "bin/nvcc")
    assert cuda.options["CMAKE_INSTALL_RPATH"].split(";") == ["$ORIGIN", str(toolkit / "lib64")]
    assert "CMAKE_CUDA_FLAGS" not in cuda.options and "GGML_CUDA_NO_VMM" not in cuda.options


def test_what_a_toolkit_lacks_comes_from_packages(toolkit: Path, tmp_path: Path, monkeypatch) -> None:
    (toolkit / "include/cublas_v2.h").unlink()
    (toolkit / "include/cccl/cub/cub.cuh").unlink()
    packages = tmp_path / "packages/nvidia/cu13"
    names = ("include/cublas_v2.h", "lib/libcublas.so.13", "lib/libcublasLt.so.13", "include/cccl/cub/cub.cuh")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in names:
        with pytest.raises(MonarchError) as failure:
            builder_cuda.find_cuda("86")
        assert "missing" in str(failure.value) and "\n" not in str(failure.value)
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
        spec = importlib.machinery.ModuleSpec("nvidia", None)
        spec.submodule_search_locations = [str(packages.parent)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
    options = builder_cuda.find_cuda("86").options
    assert options["CUDA_cublas_LIBRARY"] == str(packages / "lib/libcublas.so.13")
    assert options["CMAKE_CUDA_FLAGS"] == f'-I"{packages}/include" -I"{packages}/include/cccl"'
    assert options["CMAKE_INSTALL_RPATH"].split(";")[1] == str(packages / "lib")


def test_cuda_that_cannot_be_built_is_refused_in_one_line(toolkit: Path, capsys) -> None:
    status, err = command_line(capsys, "build", "--cuda-arch", "61")
    assert status == 2 and "'61' is no architecture of 75 or above" in err and err.count("\n") == 1
    write_tool(toolkit / "bin", "nvidia-smi", "6.1")
    status, err = command_line(capsys, "build", "--cuda")
    assert status == 1 and "architecture 61" in err and err.count("\n") == 1
    write_tool(toolkit / "bin", "nvidia-smi", "No devices were found")
    status, err = command_line(capsys, "build", "--cuda")
    assert status == 1 and "no NVIDIA card" in err and err.count("\n") == 1
    write_tool(toolkit / "bin", "nvcc", "Cuda compilation tools, release 11.8, V11.8.89")
    status, err = command_line(capsys, "build", "--cuda-arch", "86")
    assert status == 1 and "release 11.8" in err and err.count("\n") == 1


def test_without_nvcc_cuda_is_refused_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_cuda.shutil, "which", lambda name, path=None: None)
    status, err = command_line(capsys, "build", "--cuda-arch", "86")
    assert status == 1 and err.startswith("error: nvcc is missing") and err.count("\n") == 1


def test_cuda_has_its_own_tree_and_the_last_asked_for_is_used(project: Project, compiler) -> None:
    [cpu] = project.build("patched")
    cuda = Cuda("86", {"GGML_CUDA": "ON"}, "nvcc 13")
    [gpu] = project.build("patched", cuda=cuda)
    assert cpu.arm_dir != gpu.arm_dir
    assert find_built("patched", project.cache, project.pin) == gpu
    project.build("patched")
    assert find_built("patched", project.cache, project.pin) == cpu
    assert compiler.compiled == ["patched", "patched"]


def test_wrong_usage_is_status_2(capsys) -> None:
    assert command_line(capsys, "build", "--jobs", "0") == (2, "error: --jobs 0: needs at least 1\n")
    for argv in (["no-such-command"], ["build", "--no-such-option"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.endswith("--help tells more\n") and err.count("\n") == 1


def test_debug_adds_the_traceback(capsys) -> None:
    status, err = command_line(capsys, "build", "--jobs", "0", "--debug")
    assert status == 2
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("error: --jobs 0")


# packaging


def make_wheel(source: Path, folder: Path) -> dict[str, bytes]:
    """Its files."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, stdout=subprocess.PIPE)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_carries_patches_native_and_licences(tmp_path: Path) -> None:
    files = make_wheel(ROOT, tmp_path)
    names = set(files)
    data = [file.relative_to(ROOT).as_posix() for folder in ("patches", "native")
            for file in builder_source.own_files(ROOT / folder).values()]
    expected = {f"monarch_llamacpp/_data/{name}" for name in [*data, "LLAMA_CPP_VERSION"]}
    assert expected <= names
    assert not [name for name in names if not name.startswith("monarch_llamacpp")]
    info = f"monarch_llamacpp-{__version__}.dist-info"
    for name in ("LICENSE", "NOTICE"):
        assert files[f"{info}/licenses/{name}"] == (ROOT / name).read_bytes()
    assert b"\nLicense-Expression: Apache-2.0\n" in files[f"{info}/METADATA"]
    assert (ROOT / "README.md").read_bytes() in files[f"{info}/METADATA"]
    assert b"monarch-llamacpp = monarch_llamacpp.cli:main" in files[f"{info}/entry_points.txt"]


def test_a_source_distribution_makes_the_same_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not {"models", "scripts", "tests"} & {Path(name).parts[1] for name in archive.getnames()}
    assert make_wheel(sdist, tmp_path / "of-sdist") == make_wheel(ROOT, tmp_path / "of-checkout")
