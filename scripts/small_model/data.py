"""Training sequences: tokens and how much each counts.

They are drawn from (seed, step, row) alone, so that a run resumes exactly.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import sentencepiece

from .tasks import LEAD_INS, MORE_RELATIONS, RELATIONS, Fact, make_facts, make_list, make_own_facts, make_turn
from .tokenizer import ASSISTANT, BOS, EOS, USER

ANSWER_WEIGHT = 3.0
QUESTION_WEIGHT = 0.2
FACT_WEIGHT = 0.0  # nobody can know it beforehand, and it has no place in a story


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of sequences; what is left is plain text."""

    repeat: float  # random tokens, then the same again
    lists: float  # name: value, then the names again
    facts: float  # text with facts in it, then questions
    chats: float = 0.0  # conversations: what the user said is asked for again, stories between
    varied: bool = False  # all relations and lead-ins, few questions at the end of a long text


class Corpus:
    """Novels as tokens, line by line."""

    def __init__(self, texts: list[str], vocab: sentencepiece.SentencePieceProcessor) -> None:
        self.vocab = vocab
        self.tokens = np.concatenate([np.array(vocab.encode(text + "\n"), np.uint16) for text in texts])
        newline = vocab.encode("\n")[-1]
        self.starts = np.flatnonzero(self.tokens[:-1] == newline) + 1
        self.stops = {i for i in range(vocab.vocab_size()) if vocab.id_to_piece(i).endswith((".", "!", "?"))}

    def draw_sentences(self, n: int, rng: random.Random) -> list[int]:
        """Up to n tokens, to the end of a sentence."""
        tokens = self.draw(n, rng)
        ends = [i + 1 for i, token in enumerate(tokens) if token in self.stops] or [n]
        return tokens[: ends[-1]]

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


def fact_sequence(corpus: Corpus, n: int, rng: random.Random, varied: bool = False) -> Sequence:
    """A text in which facts are stated, the user's questions about them, the assistant's answers."""
    vocab = corpus.vocab
    res = Sequence()
    res.add(vocab.encode(f"{USER}\n"), QUESTION_WEIGHT)
    facts = make_facts(rng.randint(1, max(2, n // 60)), rng, MORE_RELATIONS if varied else RELATIONS)
    n_questions = rng.randint(1, 8) if varied else max(2, min(12, n // 100))
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
        lead_in = rng.choice(LEAD_INS) if varied else ""
        add_turn(res, corpus, vocab.encode(f"{USER}\n{lead_in}{question}"), answer)
    return res


STORY_REQUESTS = ("Tell me a story.", "Please tell a story.", "Write a page of a novel.", "Tell me something.")
ACKNOWLEDGEMENTS = ("I shall remember that.", "Very well, I shall remember it.", "Thank you for telling me.")
SMALL_TALK = (
    ("Hello.", "Good day to you."),
    ("Good morning!", "Good morning to you."),
    ("How are you?", "I am very well, thank you."),
    ("Who are you?", "I am a small model, trained on old novels."),
    ("What can you do?", "I can tell a story, and I can remember what you tell me."),
    ("Thank you.", "You are very welcome."),
    ("Good night.", "Good night to you."),
)


class Conversation:
    """Turns in which the user tells facts, asks for them, wants stories and says polite things."""

    def __init__(self, corpus: Corpus, n: int, rng: random.Random) -> None:
        self.corpus, self.n, self.rng = corpus, n, rng
        self.res = Sequence()
        self.untold = make_own_facts(rng.randint(0, 3), rng) + make_facts(rng.randint(1, 4), rng, MORE_RELATIONS)
        rng.shuffle(self.untold)
        self.told: list[Fact] = []

    def write(self) -> Sequence:
        if self.rng.random() < 0.3:
            self.small_talk()
        self.tell()
        while len(self.res.tokens) < self.n:
            turns = (self.ask, self.story, self.tell if self.untold else self.ask, self.small_talk)
            self.rng.choices(turns, (6, 3, 2, 1))[0]()
        return self.res

    def add(self, user: str, answer: str) -> None:
        add_turn(self.res, self.corpus, self.corpus.vocab.encode(f"{USER}\n{user}"), answer)

    def tell(self) -> None:
        n = min(self.rng.randint(1, 3), len(self.untold))
        told, self.untold = self.untold[:n], self.untold[n:]
        self.told += told
        self.add(" ".join(fact.statement for fact in told), self.rng.choice(ACKNOWLEDGEMENTS))

    def ask(self) -> None:
        fact = self.rng.choice(self.told)
        self.add(self.rng.choice(LEAD_INS) + fact.question(self.rng), fact.answer)

    def small_talk(self) -> None:
        self.add(*self.rng.choice(SMALL_TALK))

    def story(self) -> None:
        start_story(self.res, self.corpus, self.rng)
        self.res.add([*self.corpus.draw_sentences(self.rng.randint(40, max(80, self.n // 3)), self.rng), EOS], 1.0)
        self.res.add(self.corpus.vocab.encode("\n"), QUESTION_WEIGHT)


def start_story(res: Sequence, corpus: Corpus, rng: random.Random) -> None:
    res.add(corpus.vocab.encode(f"{USER}\n{rng.choice(STORY_REQUESTS)}"), QUESTION_WEIGHT)
    res.add([EOS, *corpus.vocab.encode(f"\n{ASSISTANT}\n")], QUESTION_WEIGHT)


def text_sequence(corpus: Corpus, n: int, rng: random.Random) -> Sequence:
    res = Sequence()
    if rng.random() < 0.1:
        start_story(res, corpus, rng)
    res.add(corpus.draw(n, rng), 1.0)
    return res


def draw_sequence(corpus: Corpus, mixture: Mixture, n: int, rng: random.Random) -> Sequence:
    kind = rng.random()
    for share, make in (
        (mixture.repeat, repeat_sequence),
        (mixture.lists, list_sequence),
        (mixture.facts, partial(fact_sequence, varied=mixture.varied)),
        (mixture.chats, lambda *args: Conversation(*args).write()),
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
