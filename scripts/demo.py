#!/usr/bin/env python3
"""`make demo`: paged chat over a document far longer than the hot window, then the comparison with upstream."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.knobs import specs
from monarch_llamacpp.recall import write_recall_model
from monarch_llamacpp.recall_text import Haystack, Needle, make_haystack

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models", "recall.gguf")
DOCUMENT = Path("models", "recall.txt")

N_HEAD, N_HEAD_KV = 8, 2  # as models of today share KV heads

N_TOKENS = 6000
NEEDLE = 2  # of ten, a quarter into the document

# the recall model has two layers only: dense, both of them would promote the whole of this document
KNOBS = ["--dense-layers", "0"]

AB = ["--depths", f"0,{N_TOKENS}", "--reps", "3", "-n", "256"]

MODES = {
    "off": "llama.cpp's own cache: everything stays, in 16 bits per value.",
    "window": "only the hot window and the first tokens stay, the rest is forgotten. No answer is to be expected.",
    "paged": "the rest is kept as 4-bit pages, and for every token the pages that matter to it are promoted.",
}

console = Console(highlight=False)


def main() -> int:
    haystack = make_haystack(N_TOKENS)
    needle = haystack.needles[NEEDLE]
    write_files(haystack)
    introduce(haystack, needle)
    correct = {mode: ask(mode, needle) for mode in MODES}
    compare()
    conclude(correct)
    return 0


def write_files(haystack: Haystack) -> None:
    (ROOT / MODEL).parent.mkdir(exist_ok=True)
    write_recall_model(ROOT / MODEL, n_head=N_HEAD, n_head_kv=N_HEAD_KV)
    (ROOT / DOCUMENT).write_text(haystack.text, encoding="utf-8")


def introduce(haystack: Haystack, needle: Needle) -> None:
    headline("1. Chat about a long document")
    say(f"""
        {DOCUMENT} is {len(haystack.tokens)} tokens of made-up sentences. At token {needle.position} it says, once:
        "{needle.sentence.strip()}" The question comes after the whole document, when that sentence has long left the
        hot window, the last {specs()['hot_window'].default} tokens.

        {MODEL} is a tiny model made by hand to look things up and nothing else: whether it answers shows what the cache
        still holds, not how clever a model is.
    """)


def ask(mode: str, needle: Needle) -> bool:
    """Whether the answer was right."""
    console.print()
    console.print(f"[bold]{mode}[/]: {MODES[mode]}")
    arguments = [str(MODEL), "-f", str(DOCUMENT), "-p", f"{needle.question.strip()}?", "--temp", "0", "--mode", mode]
    answer = run("chat", [*arguments, *(KNOBS if mode == "paged" else [])], stdout=subprocess.PIPE).stdout.strip()
    correct = answer == needle.answer.strip()
    verdict = "[green]correct[/]" if correct else "[red]not the passphrase[/]"
    console.print(f"  question: {needle.question.strip()}?\n  answer:   [bold]{answer}[/]  {verdict}")
    return correct


def compare() -> None:
    headline("2. Beside unmodified llama.cpp: speed, memory, recall")
    say("""
        The same source, built twice: stock is unmodified, the other arms are the patched build. Each is timed by
        llama.cpp's own llama-bench. Ten passphrases are asked for. This takes a few minutes, longer on a busy machine.
    """)
    run("ab", [str(MODEL), *AB, *KNOBS])


def conclude(correct: dict[str, bool]) -> None:
    headline("3. What this says")
    if not (correct["off"] and correct["paged"]) or correct["window"]:
        raise MonarchError(f"the demo did not show what it should: correct answers were {correct}")
    say(f"""
        found: window forgets; paged and exact know what stock knows.

        vs stock at {N_TOKENS}: what reading less gives; at 0: what paging costs while there is nothing to page. This
        model is all attention. One with more weights gains less at the same depth.

        KV cache: a fixed part for the hot window, and about a quarter of stock's bytes for every older token.

        What 4-bit pages cost in quality, and how to run all this on a model of yours: README.md. To see it tested: make
        test.
    """)


def headline(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}[/]", align="left")


def say(text: str) -> None:
    """Paragraphs, with empty lines between."""
    width = min(console.width, 100)
    paragraphs = textwrap.dedent(text).strip().split("\n\n")
    console.print("\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in paragraphs))


def run(command: str, arguments: list[str], **options: Any) -> subprocess.CompletedProcess:
    full = [os.path.relpath(sys.executable, ROOT), "-m", "monarch_llamacpp", command, *arguments]
    console.print(f"[dim]$ {shlex.join(full)}[/]", soft_wrap=True)
    result = subprocess.run([sys.executable, *full[1:]], cwd=ROOT, text=True, **options)
    if result.returncode != 0:
        raise MonarchError(f"{command} ended with status {result.returncode}")
    return result


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MonarchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
