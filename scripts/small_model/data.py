"""Training sequences: tokens and how much each counts, drawn from (seed, step, row) alone, so that a run resumes exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from .tasks import make_facts, make_list, make_turn
from .tokenizer import ASSISTANT, BOS, EOS, USER, read_novel

ANSWER_WEIGHT = 3.0
QUESTION_WEIGHT = 0.2
FACT_WEIGHT = 0.1  # nobody can know it beforehand


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of sequences; what is left is plain text."""

    repeat: float  # random tokens, then the same again
    lists: float  # name: value, then the names again
    facts: float  # text with facts in it, then questions


def split_novels(folder: Path) -> tuple[list[Path], list[Path]]:
    """For training and, every twentieth, for validation."""
    paths = sorted(folder.rglob("*.txt"))
    kept_out = paths[10::20]
    return [path for path in paths if path not in kept_out], kept_out


class Corpus:
    """Novels as tokens, line by line."""

    def __init__(self, paths: list[Path], vocab: sentencepiece.SentencePieceProcessor) -> None:
        self.vocab = vocab
        texts = [read_novel(path) for path in paths]
        self.tokens = np.concatenate([np.array(vocab.encode(text + "\n"), np.uint16) for text in texts])
        newline = vocab.encode("\n")[-1]
        self.starts = np.flatnonzero(self.tokens[:-1] == newline) + 1
        self.stops = {i for i in range(vocab.vocab_size()) if vocab.id_to_piece(i).endswith((".", "!", "?"))}

    def draw(self, n: int, rng: random.Random) -> list[int]:
        """n tokens from the start of a paragraph on."""
        start = int(self.starts[rng.randrange(len(self.starts))])
        start = min(start, len(self.tokens) - n)
        return self.tokens[start : start + n].tolist()


class Sequence:
    def __init__(self) -> None:
        self.tokens, self.weights = [BOS], [0.0]

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)


def repeat_sequence(corpus: Corpus, n: int, rng: random.Random) -> Sequence:
    res = Sequence()
    length = min(rng.randint(16, 192), n // 2 - 1)
    while len(res.tokens) < n:
        if rng.random() < 0.7:
            part = [rng.randrange(3, corpus.vocab.vocab_size()) for _ in range(length)]
        else:
            part = corpus.draw(length, rng)
        res.add(part, 0.0)
        res.add(part[:1], 0.0)
        res.add(part[1:], 1.0)
    return res


def list_sequence(corpus: Corpus, n: int, rng: random.Random) -> Sequence:
    res = Sequence()
    while len(res.tokens) < n:
        lines, asked = make_list(rng.randint(3, max(4, min(40, n // 24))), rng)
        res.add(corpus.vocab.encode(lines + "\n\n"), FACT_WEIGHT)
        for key, value in asked:
            res.add(corpus.vocab.encode(key), FACT_WEIGHT)
            res.add(corpus.vocab.encode(value), ANSWER_WEIGHT)
            res.add(corpus.vocab.encode("\n"), FACT_WEIGHT)
    return res


def add_turn(res: Sequence, corpus: Corpus, question: list[int], answer: str) -> None:
    """One question and its answer; the user's turn may be open already."""
    res.add(question, QUESTION_WEIGHT)
    res.add([EOS, *corpus.vocab.encode(f"\n{ASSISTANT}\n")], QUESTION_WEIGHT)
    res.add([*corpus.vocab.encode(answer), EOS], ANSWER_WEIGHT)
    res.add(corpus.vocab.encode("\n"), QUESTION_WEIGHT)


def fact_sequence(corpus: Corpus, n: int, rng: random.Random) -> Sequence:
    """A text in which facts are stated, the user's questions about them, the assistant's answers."""
    vocab = corpus.vocab
    res = Sequence()
    res.add(vocab.encode(f"{USER}\n"), QUESTION_WEIGHT)
    facts = make_facts(rng.randint(1, max(2, n // 60)), rng)
    n_questions = max(2, min(12, n // 100))
    n_text = max(8, n - 60 * n_questions - 24 * len(facts))
    if rng.random() < 0.3:
        n_text = rng.randint(8, n_text)
    text = corpus.draw(n_text, rng)
    ends = [i + 1 for i, token in enumerate(text) if token in corpus.stops] or [n_text]
    cuts = sorted(rng.choice(ends) for _ in facts)
    at = 0
    for fact, cut in zip(facts, cuts, strict=True):
        res.add(text[at:cut], 1.0)
        res.add(vocab.encode(f" {fact.statement}"), FACT_WEIGHT)
        at = cut
    res.add(text[at:], 1.0)
    question, answer = make_turn(facts, rng)
    add_turn(res, corpus, vocab.encode(f"\n\n{question}"), answer)
    while len(res.tokens) < n:
        question, answer = make_turn(facts, rng)
        add_turn(res, corpus, vocab.encode(f"{USER}\n{question}"), answer)
    return res


STORY_REQUESTS = ("Tell me a story.", "Please tell a story.", "Write a page of a novel.", "Tell me something.")


def text_sequence(corpus: Corpus, n: int, rng: random.Random) -> Sequence:
    res = Sequence()
    if rng.random() < 0.1:
        res.add(corpus.vocab.encode(f"{USER}\n{rng.choice(STORY_REQUESTS)}"), QUESTION_WEIGHT)
        res.add([EOS, *corpus.vocab.encode(f"\n{ASSISTANT}\n")], QUESTION_WEIGHT)
    res.add(corpus.draw(n, rng), 1.0)
    return res


def draw_sequence(corpus: Corpus, mixture: Mixture, n: int, rng: random.Random) -> Sequence:
    kind = rng.random()
    for share, make in (
        (mixture.repeat, repeat_sequence),
        (mixture.lists, list_sequence),
        (mixture.facts, fact_sequence),
    ):
        if kind < share:
            return make(corpus, n, rng)
        kind -= share
    return text_sequence(corpus, n, rng)


def draw_batch(
    corpus: Corpus, mixture: Mixture, n_rows: int, n_tokens: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """tokens [n_rows, n_tokens + 1] and the weight of predicting tokens[:, 1:], [n_rows, n_tokens]."""
    tokens = np.zeros((n_rows, n_tokens + 1), np.int64)
    weights = np.zeros((n_rows, n_tokens), np.float32)
    for row in range(n_rows):
        sequence = draw_sequence(corpus, mixture, n_tokens + 1, random.Random(f"{seed}-{step}-{row}"))
        tokens[row] = sequence.tokens[: n_tokens + 1]
        weights[row] = sequence.weights[1 : n_tokens + 1]
    return tokens, weights

