"""Files that commands write."""

import os
import stat
from pathlib import Path

import pytest

from monarch_llamacpp.errors import UsageError
from monarch_llamacpp.output_file import check_gguf_output, check_output, replaced


def write(file: Path, text: str) -> None:
    with replaced(file) as part:
        part.write_text(text)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ("first", "second"):
        write(file, text)
        assert file.read_text() == text and list(tmp_path.iterdir()) == [file]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(file)
    write(link, "text")
    assert link.is_symlink() and file.read_text() == "text" and not file.is_symlink()


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(OSError, match="No space"), replaced(file) as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "text").write_text("text")
    refused = {
        pipe: "device or a pipe",
        Path("/dev/null"): "device or a pipe",
        tmp_path: "is a folder",
        tmp_path / "nowhere" / "file": "does not exist",
    }
    for file, why in refused.items():
        with pytest.raises(UsageError, match=why):
            write(file, "text")
        with pytest.raises(UsageError, match=why):
            check_output(file)
    with pytest.raises(UsageError, match="is no GGUF"):
        check_gguf_output(tmp_path / "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and Path("/dev/null").is_char_device()
