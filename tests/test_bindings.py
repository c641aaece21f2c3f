"""llama-cpp-python's own tests, on the patched library: prompt reuse, its states and caches, with paging off and on."""

import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest
from child import TESTS, environment
from logits import EXACT_CODEC
from native_kernels import upstream_dir

from monarch_llamacpp import builder_source, paths, pin

# not the recall model: what it says next does not depend on every token before, as one of these tests wants
MODEL = TESTS.parent / "models" / "monarch-small.gguf"

# their contexts have 64 tokens, of which their prompts of a few words would leave the pages empty
LONGER = '    prompt = "The quick brown fox"\n', '    prompt = "The quick brown fox " * 5\n'
PAGED = EXACT_CODEC | {
    "MONARCH_MODE": "exact", "MONARCH_SINK_TOKENS": "4", "MONARCH_HOT_WINDOW": "16", "MONARCH_PAGE_SIZE": "8",
}  # fmt: skip
DOWNLOADS = 14  # Qwen's words (3), recurrent (5) and hybrid models (5), embeddings (1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their tests as the pinned sdist holds them, where they look for upstream's vocabulary."""
    folder = tmp_path_factory.mktemp("bindings")
    with tarfile.open(builder_source.ensure_sdist(pin.read_pin(), paths.cache_dir(), None)) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.parts[1:-1] == ("tests",):
                text = archive.extractfile(member).read().decode()
                (folder / path.name).write_text(text.replace(*LONGER), encoding="utf-8")
    (folder / "vendor").mkdir()
    (folder / "vendor" / "llama.cpp").symlink_to(upstream_dir())
    return folder


@pytest.mark.parametrize("env", [{}, PAGED], ids=["off", "paged"])
def test_their_tests_pass(patched_bin: Path, folder: Path, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-rA", "-c", "/dev/null", "-p", "bindings_plugin"]
    command += sorted(str(file) for file in folder.glob("test_*.py"))
    extra = env | {"PYTHONPATH": str(TESTS), "BINDINGS_MODEL": str(MODEL)}
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment(patched_bin, extra)
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert f"{DOWNLOADS} skipped" in result.stdout.splitlines()[-1]
    assert "PASSED test_llama.py::test_loaded_exact_cached_prompt_reuse_matches_fresh" in result.stdout
