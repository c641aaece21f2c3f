#!/usr/bin/env python3
"""`make demo`: paged chat about a story longer than the hot window, then the comparison with upstream."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from monarch_llamacpp.errors import MonarchError

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models", "monarch-small.gguf")
STORY = Path("scripts", "demo_story.txt")

HOT_WINDOW = 256

PAGED = ["--hot-window", str(HOT_WINDOW), "--promote-tokens", "256"]

AB = ["--depths", "0,3584", "--reps", "3", "-n", "64", "--parts", "memory,speed"]
AB += ["--arms", "stock,patched-off,window,paged,exact"]

MODES = {
    "off": ("llama.cpp's own cache: everything stays, in 16 bits per value.", []),
    "window": ("only the hot window and the first tokens stay, the rest is forgotten. Do not expect answers.", PAGED),
    "paged": ("the rest is kept as 4-bit pages, and for every token the pages that matter to it are promoted.", PAGED),
}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str  # what a right answer contains


QUESTIONS = (
    Question("What is the secret code of Edith Marford?", "48213"),
    Question("Where is Oliver Brandwell?", "mill"),
    Question("What does Henry Tarlow carry?", "silver key"),
    Question("What is the dog of Martin Dray called?", "Pilbo"),
)

console = Console(highlight=False)


def main() -> int:
    introduce()
    correct = {mode: ask(mode) for mode in MODES}
    compare()
    conclude(correct)
    return 0


def introduce() -> None:
    headline("1. Chat about a story")
    say(f"""
        {STORY} is a story of 1150 words, about 1700 tokens. A few of its sentences have nothing to do with it: they say
        somebody's secret code, or what somebody carries. The questions come after the whole story, when those have long
        left the hot window, the last {HOT_WINDOW} tokens.

        {MODEL} is a very small model, trained for this project (models/README.md): it knows little, but it looks things
        up in what it read. What it answers shows what the cache still holds.
    """)


def ask(mode: str) -> int:
    """How many answers were right."""
    about, knobs = MODES[mode]
    console.print()
    console.print(f"[bold]{mode}[/]: {about}")
    arguments = [str(MODEL), "-f", str(STORY), "--temp", "0", "-n", "48", "--mode", mode, *knobs]
    lines = "\n".join(question.text for question in QUESTIONS)
    answers = run("chat", arguments, stdout=subprocess.PIPE, input=lines).stdout.strip().split("\n")
    n_correct = 0
    for question, answer in zip(QUESTIONS, answers + [""] * len(QUESTIONS), strict=False):
        right = question.answer in answer
        n_correct += right
        verdict = "[green]right[/]" if right else "[red]wrong[/]"
        console.print(f"  {question.text}  [bold]{answer.strip()}[/]  {verdict}", soft_wrap=True)
    return n_correct


def compare() -> None:
    headline("2. Beside unmodified llama.cpp: speed and memory")
    say("""
        The same source, built twice: stock is unmodified, the other arms are the patched build. Each is timed by
        llama.cpp's own llama-bench. This takes a few minutes, longer on a busy machine.
    """)
    run("ab", [str(MODEL), *AB, *PAGED])


def conclude(correct: dict[str, int]) -> None:
    headline("3. What this says")
    if correct["window"] >= min(correct["off"], correct["paged"]):
        raise MonarchError(f"the demo did not show what it should: right answers were {correct} of {len(QUESTIONS)}")
    counts = ", ".join(f"{mode} {n}" for mode, n in correct.items())
    say(f"""
        Right answers of {len(QUESTIONS)}: {counts}. (off is upstream's own cache.)

        vs stock: what reading less gives at that depth; at 0: what paging costs while there is nothing to page. This
        model is tiny and its context short: longer contexts gain more (README.md).

        KV cache: a fixed part for the hot window, and 0.30 of stock's bytes for every older token.

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
