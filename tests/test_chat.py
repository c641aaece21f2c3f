"""Chat: its parts without a build, then whole transcripts through a pipe and a terminal on the real libraries."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from child import TESTS
from hypothesis import given
from hypothesis import strategies as st

import models as random_models
from monarch_llamacpp import paths
from monarch_llamacpp.chat_commands import COMMANDS, read_text, run_command
from monarch_llamacpp.chat_input import Entry, read_entry
from monarch_llamacpp.chat_state import HEAD
from monarch_llamacpp.chat_view import pages_picture, pages_summary
from monarch_llamacpp.errors import MonarchError, UsageError
from monarch_llamacpp.knobs import Knobs
from monarch_llamacpp.recall import write_recall_model
from monarch_llamacpp.recall_text import make_haystack
from monarch_llamacpp.shim import Page
from monarch_llamacpp.stats import Stats
from monarch_llamacpp.utf8_stream import Utf8Stream

PATIENCE = 120  # seconds for what takes a moment: a bound against hanging, not a measurement

NO_STATS = dict.fromkeys(Stats.__dataclass_fields__, 0)

# parts


@given(st.text(), st.data())
def test_streamed_text_is_the_text_however_it_is_cut(text, data):
    stream, out, rest = Utf8Stream(), [], text.encode()
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        out.append(stream.feed(rest[:n]))
        rest = rest[n:]
    assert "�" in text or not any("�" in piece for piece in out)
    assert "".join(out) + stream.end() == text


@given(st.lists(st.binary()))
def test_streaming_takes_any_bytes(pieces):
    stream = Utf8Stream()
    text = "".join(map(stream.feed, pieces)) + stream.end()
    assert text == b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("lines", "entries"),
    [
        (["hi", "there"], [Entry("hi"), Entry("there")]),
        (["a\\", "b\\", "c", "d"], [Entry("a\nb\nc"), Entry("d")]),
        (["a\\"], [Entry("a")]),
        (['"""a', "/b", 'c"""', "d"], [Entry("a\n/b\nc"), Entry("d")]),
        (['"""', "a", "", "b", '"""  '], [Entry("a\n\nb")]),
        (['"""one"""'], [Entry("one")]),
        (['"""', "never closed"], [Entry("never closed")]),
        (["/set mode paged ", " /x"], [Entry("/set mode paged", is_command=True), Entry(" /x")]),
        ([""], [Entry("")]),
    ],
)
def test_lines_become_messages(lines, entries):
    rest = iter(lines)
    prompts = []

    def read_line(prompt):
        prompts.append(prompt)
        return next(rest, None)

    read = []
    while (entry := read_entry(read_line)) is not None:
        read.append(entry)
    assert read == entries
    assert set(prompts) <= {">>> ", "... "}


def stats(**values) -> Stats:
    return Stats(**{**NO_STATS, **values})


TABLE = [Page(16, 16, 0, 0), Page(32, 16, 2, 0), Page(48, 16, 1, 1), Page(64, 9, 0, 0)]


def test_pages_picture():
    picture = pages_picture(TABLE, stats(n_tokens=123, n_hot=66, n_cold=57), Knobs(), width=80, color=False)
    assert picture.splitlines() == [
        "  0 S.+*.####",
        "S sink: 1",
        "# hot: 4",
        "* sticky in some layer and head: 1",
        "+ promoted in some layer and head: 1",
        ". cold: 2",
    ]


def test_pages_picture_wraps_and_tells_where_each_row_begins():
    pages = [Page(16 * i, 16, 0, 0) for i in range(1, 21)]
    rows = pages_picture(pages, stats(n_tokens=400, n_hot=80, n_cold=320), Knobs(), width=14, color=False).splitlines()
    assert rows[:3] == ["  0 S.........", "160 ..........", "320 .####"]
    assert all(len(row) <= 14 for row in rows[:3])


def test_pages_picture_of_little():
    assert pages_picture([], stats(), Knobs(), 80, color=False).startswith("S sink: 0")
    assert pages_picture([], stats(n_tokens=5, n_hot=5), Knobs(), 80, color=False).startswith("0 S\n")
    no_sink = pages_picture([], stats(n_tokens=20, n_hot=20), Knobs(sink_tokens=0), 1, color=False)
    assert no_sink.startswith(" 0 #\n16 #\n")


def test_pages_picture_in_color_differs_only_in_color():
    table = stats(n_tokens=123, n_hot=66, n_cold=57)
    plain, colored = (pages_picture(TABLE, table, Knobs(), 80, color=color) for color in (False, True))
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain != colored


def test_pages_summary_gives_the_mean_of_promoted_pages():
    held = stats(n_hot=33, n_pages=120, n_promoted=25, n_layer=5, n_head_kv=2, hot_bytes=1 << 20, cold_bytes=1 << 19)
    assert pages_summary(held, 16) == "3 hot, 2.5 promoted, 120 cold pages | KV 1.5 MiB"


def test_commands_refuse_in_one_line():
    for line in ("/nope", "/", "/load", "/save", "/set mode"):
        with pytest.raises(UsageError):
            run_command(None, line)
    assert " ".join(COMMANDS) == "/help /clear /regen /system /load /save /set /stats /pages /exit"


def test_only_text_is_loaded(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"GGUF\0\0")
    for path, reason in ((binary, "not a text file"), (tmp_path, "directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(MonarchError, match=reason):
            read_text(str(path))
    binary.write_bytes(b"caf\xc3\xa9 \xff")
    assert read_text(str(binary)) == "café �"


# transcripts


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """recall.gguf answers what it read; babble.gguf never stops and has no template."""
    folder = tmp_path_factory.mktemp("chat")
    write_recall_model(folder / "recall.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_models, "N_VOCAB", 3 + 256)  # every byte: any text has tokens
        random_models.write_random_model(folder / "babble.gguf")
    forbid_token(folder / "babble.gguf", 2)
    return folder


def forbid_token(path: Path, token: int) -> None:
    """Its logit is always 0, which is never the largest of hundreds."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["output.weight"][token] = 0
    tensors["output.weight"].flush()


class Runner:
    """chat in a child process, on one library."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.command = command
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MONARCH")}
        self.env = {**kept, "PYTHONPATH": str(TESTS.parent), "TERM": "dumb", "COLUMNS": "80", **env}

    def argv(self, model: str, *args: object) -> list[str]:
        return [*self.command, str(self.folder / model), "--temp", "0", "--threads", "1", *map(str, args)]

    def run(self, model: str, *args: object, stdin: str = "") -> subprocess.CompletedProcess:
        argv = self.argv(model, *args)
        return subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE, env=self.env, cwd=self.folder
        )


@pytest.fixture(scope="session")
def fake(models, stock_bin) -> Runner:
    """Unmodified upstream with a made-up page table: what chat does without a paged cache."""
    env = {"LLAMA_CPP_LIB_PATH": str(stock_bin), "MONARCH_CACHE": str(models / "cache")}
    return Runner([sys.executable, str(TESTS / "child_chat.py")], models, env)


@pytest.fixture(scope="session")
def real(models, patched_bin) -> Runner:
    """What users run."""
    cache = models / "real-cache"  # the builds, but a history of its own
    cache.mkdir()
    for build in paths.cache_dir().glob("*-*"):
        (cache / build.name).symlink_to(build)
    return Runner([sys.executable, "-m", "monarch_llamacpp", "chat"], models, {"MONARCH_CACHE": str(cache)})


@pytest.fixture(scope="session")
def haystack(models):
    text = make_haystack(3000, 4)
    (models / "long.txt").write_text(text.text)
    return text


def question(needle) -> str:
    return needle.question.strip() + "?"


def expected(needle) -> str:
    return needle.answer.strip() + "\n"


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_one_prompt_answers_to_stdout_and_all_else_to_stderr(fake, haystack):
    needle = haystack.needles[1]
    result = fake.run("recall.gguf", "-f", "long.txt", "-p", question(needle))
    assert (result.returncode, result.stdout) == (0, expected(needle))
    line = r"^\[prompt 30\d\d at [\d.]+ tok/s \| answer \d+ at [\d.]+ tok/s \| .*KV 1.5 MiB\]$"
    assert re.search(line, result.stderr, re.M)


def test_piped_text_comes_before_the_prompt(fake, haystack):
    needle = haystack.needles[2]
    for args in ([], ["-f", "-"]):
        result = fake.run("recall.gguf", *args, "-p", question(needle), stdin=haystack.text)
        assert (result.returncode, result.stdout) == (0, expected(needle))


def test_a_whole_conversation_through_a_pipe(fake, haystack):
    first, second = haystack.needles[:2]
    asked = [question(first), question(second), "/regen", "/clear", question(first)]
    lines = ["/load long.txt", *asked, "/exit", "not read"]
    result = fake.run("recall.gguf", stdin="\n".join(lines) + "\n")
    assert result.stdout == expected(first) + 2 * expected(second) + "unknown.\n"
    assert result.returncode == 0 and not errors(result)
    reused = [int(n) for n in re.findall(r", (\d+) reused", result.stderr)]
    assert len(reused) == 2 and min(reused) > 2900  # the long text was read once


def test_multi_line_message_and_system_text(fake):
    lines = ["/system The passphrase is", "/system", '"""one', 'two"""', "a\\", "b"]
    result = fake.run("recall.gguf", stdin="\n".join(lines))
    assert result.stderr.count("system message: The passphrase is") == 2
    assert result.stdout.count("\n") == 2
    assert result.returncode == 0


def test_commands_in_a_pipe(fake):
    lines = ["/help", "/pages", "/stats", "/set promote-tokens 64", "/set", "/set hot_window 64", "/set nope 1", "/foo"]
    result = fake.run("recall.gguf", stdin="\n".join(lines))
    assert result.stdout == ""
    assert "  0 S.+*.###" in result.stderr
    assert re.search(r"^n_pages +4$", result.stderr, re.M)
    assert re.search(r"^promote_tokens +64$", result.stderr, re.M)
    assert all(name in result.stderr for name in COMMANDS)
    assert [line.split(":")[1].split()[0] for line in errors(result)] == ["hot_window", "no", "unknown"]
    assert result.returncode == 1


def test_full_context_keeps_the_conversation(fake):
    lines = ["AAAA", "BBBB" * 50, "/regen"]
    result = fake.run("babble.gguf", "--ctx-size", 256, "-n", 100, stdin="\n".join(lines))
    assert result.returncode == 1
    assert [line[:28] for line in errors(result)] == ["error: context full: the con"]
    assert "/clear" in errors(result)[0] and "--ctx-size" in errors(result)[0]
    first, again = result.stdout[: len(result.stdout) // 2], result.stdout[len(result.stdout) // 2 :]
    assert first == again != ""


def test_context_fills_during_an_answer(fake):
    result = fake.run("babble.gguf", "--ctx-size", 256, "-p", "AAAA")
    assert result.returncode == 1 and result.stdout
    size = "the conversation fills 256 tokens of 256"
    assert errors(result) == [f"error: context full: {size}; /clear starts anew, --ctx-size N makes it larger"]


def test_a_file_larger_than_the_context_is_refused_before_reading(fake, haystack):
    result = fake.run("recall.gguf", "--ctx-size", 512, "-f", "long.txt", "-p", "x")
    assert (result.returncode, result.stdout) == (1, "")
    assert "the text needs" in result.stderr and "of 512" in result.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--hot-window", "3"], "hot_window = 3: allowed is 16 to 1048576"),
        (["--mode", "fast"], "mode = fast: allowed is off, window, paged, exact, auto"),
        (["--temp", "-1"], "--temp -1.0: allowed is 0 and more"),
        (["--threads", "0"], "--threads 0: allowed is 1 to 512"),
        (["--ctx-size", "4294967297"], "--ctx-size 4294967297: allowed is 1 to 2147483647, 0 for the trained context"),
        (["--threads", "513"], "--threads 513: allowed is 1 to 512"),
        (["-n", "-2"], "-n -2: allowed is 0 and more, -1 until the model ends its answer"),
        (["--n-gpu-layers", "4294967296"], "--n-gpu-layers 4294967296: allowed is 0 to 2147483647, -1 for all"),
        (["--ctx-size", "-1"], "--ctx-size -1: allowed is 1 to 2147483647, 0 for the trained context"),
        (["--seed", "-1"], "--seed -1: allowed is 0 to 4294967295"),
        (["-f", "-"], "--file - needs --prompt: standard input cannot be both text and conversation"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(fake, args, line):
    result = fake.run("recall.gguf", *args)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {line}\n")


def test_bad_models_are_one_line_and_status_1(fake, models):
    data = (models / "recall.gguf").read_bytes()
    sizes = {"empty.gguf": 0, "header.gguf": 43, "vocabulary.gguf": 3000, "tensors.gguf": len(data) - 100}
    for name, size in sizes.items():
        (models / name).write_bytes(data[:size])
    (models / "folder.gguf").mkdir()
    (models / "text.gguf").write_text("this is no model")
    for name in (*sizes, "text.gguf", "missing.gguf", "folder.gguf"):
        result = fake.run(name, "-p", "x")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), (name, result.stderr)
        assert name in result.stderr and "no reason" not in result.stderr


def test_a_model_s_name_is_text(fake, models):
    name = os.fsdecode(b"caf\xe9.gguf")
    (models / name).symlink_to("recall.gguf")
    result = fake.run(name, "-p", "x")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "only names in UTF-8" in result.stderr


def test_closed_output_is_no_traceback(fake):
    process = subprocess.Popen(
        fake.argv("babble.gguf", "-p", "A"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=fake.env, text=True
    )
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(PATIENCE) == 1
    assert "Traceback" not in stderr and "Exception" not in stderr


# the paged cache


def test_paged_chat_recalls_what_left_the_hot_window(real, haystack):
    first, second = haystack.needles[:2]
    asked = [question(first), "/pages", "/set mode window", question(second), "/set mode exact", "/regen", "/stats"]
    result = real.run("recall.gguf", *PAGED, "-f", "long.txt", stdin="\n".join(asked))
    assert (result.returncode, errors(result)) == (0, []), result.stderr
    assert result.stdout == expected(first) + "unknown.\n" + expected(second)
    assert re.search(r"^   0 S[.+*]{50}", result.stderr, re.M)
    n_promoted = [int(n) for n in re.findall(r"hot, (\d+) promoted, \d+ cold pages", result.stderr)]
    n_cold = [int(n) for n in re.findall(r"promoted, (\d+) cold pages", result.stderr)]
    assert n_promoted[0] == 8 and n_promoted[1] == 0 and n_promoted[2] == n_cold[2] > 150
    assert re.search(r"^mode +exact$", result.stderr, re.M)


PAGED = ["--mode", "paged", "--hot-window", 64, "--promote-tokens", 128, "--dense-layers", 0]


def test_a_kept_conversation_goes_on_without_reading_it_again(real, haystack, tmp_path):
    first, second = haystack.needles[:2]
    file = tmp_path / "kept"
    begun = real.run("recall.gguf", *PAGED, "--session", file, "-f", "long.txt", "-p", question(first))
    assert (begun.returncode, begun.stdout) == (0, expected(first)), begun.stderr
    assert file.stat().st_size < 0.35 * 2 * 2 * 128 * 2 * 3000 + 2**17  # of f16 K and V of 3000 tokens in two layers
    went_on = real.run("recall.gguf", *PAGED, "--session", file, stdin=question(second))
    assert (went_on.returncode, went_on.stdout) == (0, expected(second)), went_on.stderr
    assert int(re.search(r", (\d+) reused", went_on.stderr)[1]) > 2900
    again = real.run("recall.gguf", *PAGED, "--session", file, stdin="/regen")
    assert again.stdout == expected(second) and "4 messages" in again.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_save_command_keeps_and_a_killed_chat_leaves_the_file_whole(real, haystack, tmp_path):
    first, second = haystack.needles[:2]
    file = tmp_path / "kept"
    command = real.argv("recall.gguf", *PAGED, "-f", "long.txt")
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    chat = subprocess.Popen(command, cwd=real.folder, env=real.env, stdin=pipe, stdout=null, stderr=null, text=True)
    chat.stdin.write(f"{question(first)}\n/save {file}\n")
    chat.stdin.flush()
    wait_for(file.exists)
    chat.kill()
    chat.wait()
    went_on = real.run("recall.gguf", *PAGED, "--session", file, stdin=question(second))
    assert (went_on.returncode, went_on.stdout) == (0, expected(second)), went_on.stderr
    assert int(re.search(r", (\d+) reused", went_on.stderr)[1]) > 2900


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_session_that_does_not_fit_is_refused_and_stays(real, haystack, tmp_path):
    file = tmp_path / "kept"
    assert real.run("recall.gguf", *PAGED, "--session", file, "-p", "hello").returncode == 0
    whole = file.read_bytes()
    _, n_description, _ = HEAD.unpack_from(whole)
    damaged = {
        "is not a saved conversation": [b"", b"x" * 100, whole[:12]],
        "does not match its checksum": [whole[:40], whole[:20] + b"#" + whole[21:]],
        "the state cannot be restored": [whole[:-100], whole[:-50] + b"####" + whole[-46:]],
        "the state cannot be restored: it is empty": [whole[: HEAD.size + n_description]],
    }
    for reason, contents in damaged.items():
        for content in contents:
            file.write_bytes(content)
            result = real.run("recall.gguf", *PAGED, "--session", file, "-p", "hello")
            assert result.returncode == 1 and len(errors(result)) == 1 and reason in result.stderr, result.stderr
            assert file.read_bytes() == content
    file.write_bytes(whole)
    result = real.run("recall.gguf", *PAGED, "--hot-window", 128, "--session", file, "-p", "hello")
    assert result.returncode == 1 and "hot_window" in errors(result)[0]
    assert file.read_bytes() == whole


def test_a_session_that_cannot_be_written_is_one_line(real, tmp_path):
    result = real.run("recall.gguf", "--session", tmp_path / "no" / "file", "-p", "hello")
    assert result.returncode == 2 and "its folder does not exist" in result.stderr
    os.mkfifo(tmp_path / "pipe")
    for file, why in ((tmp_path, "is a folder"), (tmp_path / "pipe", "is a device or a pipe")):
        result = real.run("recall.gguf", "--session", file, "-p", "hello")
        assert result.returncode == 2 and result.stderr.startswith(f"error: --session {file}: {file} {why}")
    (tmp_path / "pipe").unlink()
    result = real.run("recall.gguf", stdin=f"hello\n/save {tmp_path}\n/save /proc/x")
    assert result.returncode == 1 and len(errors(result)) == 2, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_save_replaces_only_a_conversation(real, tmp_path):
    other, kept = tmp_path / "book.txt", tmp_path / "kept"
    other.write_text("precious")
    result = real.run("recall.gguf", stdin=f"/save {other}\n/save {kept}\nhello\n/save {kept}")
    assert errors(result) == [f"error: {other} exists and is not a saved conversation: name another file"]
    assert other.read_text() == "precious" and result.stderr.count("tokens kept in") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_session_is_kept_when_the_process_is_ended(real, haystack, tmp_path, number):
    child = terminal(real, "recall.gguf", *PAGED, "--session", tmp_path / "idle", "-f", real.folder / "long.txt")
    child.type(question(haystack.needles[0]) + "\n")
    child.wait_for(r"\[prompt 30\d\d .*\n")
    child.wait_for(PROMPT)
    time.sleep(REACTION)
    child.signal(number)
    assert child.status() == 128 + number
    went_on = real.run("recall.gguf", *PAGED, "--session", tmp_path / "idle", stdin=question(haystack.needles[1]))
    assert went_on.stdout == expected(haystack.needles[1]) and ", 2 messages" in went_on.stderr

    child = terminal(real, "babble.gguf", "--session", tmp_path / "busy")
    child.type("hello\n")
    child.wait_for("hello\r?\n.")
    time.sleep(REACTION)
    child.signal(number)
    assert child.status() == 128 + number and (tmp_path / "busy").exists()


@pytest.mark.parametrize(("when", "status", "n_answers"), [("answer", 128 + signal.SIGTERM, 1), ("save", 0, 2)])
def test_an_end_at_the_last_moment_is_one(real, tmp_path, when, status, n_answers):
    child = Runner([sys.executable, str(TESTS / "child_chat_end.py"), when], real.folder, real.env)
    result = child.run("recall.gguf", "-n", 4, "--session", tmp_path / "kept", stdin="hello\nhello\n")
    assert (result.returncode, result.stderr.count("[prompt ")) == (status, n_answers), result.stderr
    went_on = real.run("recall.gguf", "--session", tmp_path / "kept", stdin="hello")
    assert f", {2 * n_answers} messages" in went_on.stderr


def test_a_session_is_kept_when_the_terminal_closes(real, tmp_path):
    child = terminal(real, "babble.gguf", "--session", tmp_path / "kept")
    child.type("hello\n")
    child.wait_for("hello\r?\n.")
    child.close()
    wait_for((tmp_path / "kept").exists)


def test_off_is_plain_llama_cpp(real, haystack):
    result = real.run("recall.gguf", "--mode", "off", "-f", "long.txt", "-p", question(haystack.needles[0]))
    assert (result.returncode, result.stdout) == (0, expected(haystack.needles[0]))
    assert result.stderr.rstrip().endswith("| paging off]")


def test_the_model_module_is_the_same_command(real, haystack):
    module = Runner([sys.executable, "-m", "monarch_llamacpp.chat"], real.folder, real.env)
    result = module.run("recall.gguf", "-f", "long.txt", "-p", question(haystack.needles[0]))
    assert (result.returncode, result.stdout) == (0, expected(haystack.needles[0]))


def test_the_library_refuses_contradictions_before_the_model_is_read(real):
    result = real.run("missing.gguf", "--hot-window", 16, "--page-size", 32)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "hot_window" in result.stderr


def test_llama_class(real, haystack):
    result = subprocess.run(
        [sys.executable, str(TESTS / "child_chat_llama.py"), str(real.folder)],
        capture_output=True, text=True, timeout=PATIENCE, env=real.env,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("exception ignored in hook on_page_out:") > 0
    assert "ZeroDivisionError" in result.stderr


# a terminal


class Terminal:
    """A child whose terminal we are."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.seen = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
            os.execvpe(argv[0], argv, env)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Reads until the pattern comes; what is read is not read again."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._fd], [], [], left)[0], f"no {pattern!r} in {self.seen[-2000:]!r}"
            data = self._read()
            assert data, f"ended before {pattern!r}: {self.seen[-2000:]!r}"
            self.seen += data
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def interrupt(self) -> None:
        """As late as a hand would: Python's input() sleeps on if a signal comes microseconds after its prompt."""
        time.sleep(REACTION)
        self.type(INTERRUPT)

    def signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def close(self) -> None:
        os.close(self._fd)

    def status(self) -> int:
        """Of the child, which has to end by itself."""
        while select.select([self._fd], [], [], PATIENCE)[0] and self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> str:
        try:
            return os.read(self._fd, 65536).decode("utf-8", "replace")
        except OSError:  # Linux: the other side is closed
            return ""


INTERRUPT = "\x03"
PROMPT = ">>> "
REACTION = 0.5  # seconds


def terminal(runner: Runner, model: str, *args: object) -> Terminal:
    child = Terminal(runner.argv(model, *args), runner.env)
    child.wait_for(PROMPT)
    return child


@pytest.mark.parametrize("runner", ["fake", "real"])
def test_interrupt_stops_a_long_prompt_and_what_was_read_stays(runner, models, request):
    runner = request.getfixturevalue(runner)
    haystack = make_haystack(12000, 2)
    (models / "longer.txt").write_text(haystack.text)
    child = terminal(runner, "recall.gguf", "-f", models / "longer.txt")
    child.type(question(haystack.needles[0]) + "\n")
    child.wait_for(r"reading the prompt: [1-9]\d* of \d+ tokens")
    child.type(INTERRUPT)
    stopped = child.wait_for(r"stopped after (\d+) tokens of the prompt")
    n_read = int(re.search(r"after (\d+) tokens", stopped)[1])
    assert 0 < n_read < len(haystack.tokens)
    child.wait_for(PROMPT)
    child.type(question(haystack.needles[0]) + "\n")
    answer = child.wait_for(r", \d+ reused")
    assert expected(haystack.needles[0]).strip() in answer
    assert int(re.search(r", (\d+) reused", answer)[1]) == n_read
    child.wait_for(PROMPT)
    child.type("/exit\n")
    assert child.status() == 0


def test_interrupt_stops_an_answer_and_twice_leaves(fake):
    child = terminal(fake, "babble.gguf")
    child.type("AAAA\n")
    child.wait_for(r"AAAA\r\n[^\[]{40}")
    child.type(INTERRUPT)
    child.wait_for(r"\[prompt \d+ at .*answer \d+ at ")
    child.wait_for(PROMPT)
    child.interrupt()
    assert child.status() == 130


def test_interrupt_twice_at_the_prompt_leaves_and_once_does_not(fake):
    child = terminal(fake, "recall.gguf")
    child.type("half a line")
    child.interrupt()
    child.wait_for("Ctrl-C again or /exit leaves")
    child.wait_for(PROMPT)
    child.type("/system\n")
    child.wait_for("system message: none")
    child.wait_for(PROMPT)
    child.interrupt()
    child.wait_for("Ctrl-C again or /exit leaves")
    child.wait_for(PROMPT)
    child.interrupt()
    assert child.status() == 130


def test_end_of_input_leaves_and_history_is_kept(fake, tmp_path):
    fake = Runner(fake.command, fake.folder, {**fake.env, "MONARCH_CACHE": str(tmp_path / "cache")})
    child = terminal(fake, "recall.gguf")
    child.type("/system remember me\n")
    child.wait_for("system message")
    child.wait_for(PROMPT)
    child.type("\x04")
    assert child.status() == 0
    history = tmp_path / "cache" / "chat_history"
    assert "/system remember me" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    child = terminal(fake, "recall.gguf")
    child.type("\x1b[A\n")
    child.wait_for("system message: remember me")
    child.wait_for(PROMPT)
    child.type("\x04")
    assert child.status() == 0
