"""Text for quality: from a file, or made by seed, with facts that are stated early and needed late; and needles in it.

Two kinds of model have a language of their own: the recall model knows passphrases only (recall_text), and the model
that ships was trained to answer questions in its template. Any other is asked to complete a sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from . import recall_text
from .errors import MonarchError

SMALL_MODEL_NAME = "monarch small"

ROOM = 64  # for a question and its answer
N_NEEDLES = 5  # in one haystack
_N_ANSWER = 24

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    depth: float
    tokens: list[int]
    expected: str
    n_answer: int


@dataclass(frozen=True)
class Haystack:
    length: int
    tokens: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    wording: int

    @property
    def statement(self) -> str:
        return _WORDINGS[self.wording][0].format(n=self.name, v=self.value)

    @property
    def plain(self) -> str:
        return _COMPLETION.format(n=self.name, v=self.value)

    @property
    def question(self) -> str:
        return _WORDINGS[self.wording][1].format(n=self.name)

    @property
    def completion(self) -> str:
        """The statement up to its value."""
        return _COMPLETION.format(n=self.name, v="").rstrip(" .")


_COMPLETION = "The secret code of {n} is {v}."
_WORDINGS = (
    (_COMPLETION, "What is the secret code of {n}?"),
    ("{n}'s secret code is {v}.", "What is {n}'s secret code?"),
    ("The number of {n} is {v}.", "What is the number of {n}?"),
    ("Remember that the secret code of {n} is {v}.", "Tell me the secret code of {n}."),
)
_FIRST = "Alice Arthur Clara Edmund Emily George Helen Henry Laura Martin Nora Oliver Peter Rose Simon Thomas".split()
_STARTS = "Bar Bran Cal Dar Fen Gar Hol Kel Lan Mar Nor Pel Ros Sel Tar Win".split()
_ENDS = "well ford ley ton dray low mond wick by stead".split()


def make_chunks(
    tokenize: Tokenize, bos: int, name: str, n_chunks: int, n_tokens: int, given: str | None
) -> list[list[int]]:
    """Each n_tokens, BOS first. Of a given text, those that llama-perplexity would take."""
    if given is None:
        return [_make_chunk(tokenize, bos, name, n_tokens, i) for i in range(n_chunks)]
    tokens = [bos, *tokenize(given)]
    if len(tokens) < n_chunks * n_tokens:
        few = f"the text has {len(tokens)} tokens, not {n_chunks * n_tokens}"
        fewer = "--text-tokens" + (" or --chunks" if n_chunks > 1 else "")
        raise MonarchError(f"{few}: give a longer one, or fewer {fewer}")
    return [[bos, *tokens[i * n_tokens + 1 : (i + 1) * n_tokens]] for i in range(n_chunks)]


def _make_chunk(tokenize: Tokenize, bos: int, name: str, n_tokens: int, seed: int) -> list[int]:
    if name == recall_text.MODEL_NAME:
        return _recall_dialogue(n_tokens, seed)
    tokens = [bos]
    for sentence in _story(n_tokens, seed):
        tokens += tokenize(sentence)
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
    raise AssertionError("a story has no end")


def _story(n_tokens: int, seed: int) -> Iterator[str]:
    """Without end; facts of its first third come back in the rest, where only memory can tell their values."""
    rng = random.Random(f"story {seed}")
    facts: list[str] = []
    n_words = 0
    for i, sentence in enumerate(recall_text.make_sentences(rng)):
        yield sentence
        n_words += len(sentence.split())
        if i % 4 != 3:
            continue
        if 4 * n_words < n_tokens:  # a token is two thirds of a word or so
            facts.append(f" {_make_facts(1, rng)[0].statement}")
            yield facts[-1]
        else:
            yield rng.choice(facts)


def _recall_dialogue(n_tokens: int, seed: int) -> list[int]:
    """A haystack, then its questions with their answers: all else is beyond the model, before and after."""
    n_needles = max(1, min(10, n_tokens // 128))
    needles = recall_text.make_haystack(n_tokens, n_needles, seed).needles  # the seed alone decides what they say
    asked = [token for needle in needles for token in needle.question_tokens() + needle.answer_tokens()]
    return recall_text.make_haystack(n_tokens - len(asked), n_needles, seed).tokens + asked


def make_haystacks(
    tokenize: Tokenize, bos: int, name: str, lengths: Sequence[int], n_each: int, given: str | None
) -> list[Haystack]:
    made = []
    for length in lengths:
        for seed in range(n_each):
            if name == recall_text.MODEL_NAME:
                made.append(_recall_haystack(length, seed))
            else:
                made.append(_haystack(tokenize, bos, name, length, seed, given))
    return made


def _recall_haystack(length: int, seed: int) -> Haystack:
    n_needles = min(10, (length - ROOM) // ROOM)
    made = recall_text.make_haystack(length - ROOM, n_needles, seed)
    questions = [
        Question((2 * i + 1) / (2 * n_needles), needle.question_tokens(), needle.answer, len(needle.answer_tokens()))
        for i, needle in enumerate(made.needles)
    ]
    return Haystack(length, made.tokens, questions)


def _haystack(tokenize: Tokenize, bos: int, name: str, length: int, seed: int, given: str | None) -> Haystack:
    """Facts at equal distances, each asked for from the end of the same text: every needle is one of several keys."""
    rng = random.Random(f"needles {length} {seed}")
    facts = _make_facts(N_NEEDLES, rng)
    generic = name != SMALL_MODEL_NAME
    said = [tokenize(f" {fact.plain if generic else fact.statement}") for fact in facts]
    tokens = [bos] if generic else [bos, *tokenize("<|user|>\n")]
    n_filler = length - ROOM - len(tokens) - sum(map(len, said))
    filler = _filler(tokenize, rng, given, max(1, n_filler // (4 * N_NEEDLES)))
    n_taken = 0
    for i, statement in enumerate(said):
        while n_taken < (2 * i + 1) / (2 * N_NEEDLES) * n_filler:
            sentence = next(filler)
            tokens += sentence
            n_taken += len(sentence)
        tokens += statement
    while n_taken < n_filler:
        sentence = next(filler)[: n_filler - n_taken]
        tokens += sentence
        n_taken += len(sentence)
    asked = [f"\n\n{fact.completion}" if generic else f"\n\n{fact.question}</s>\n<|assistant|>\n" for fact in facts]
    depths = [(2 * i + 1) / (2 * N_NEEDLES) for i in range(N_NEEDLES)]
    questions = [
        Question(depth, tokenize(text), fact.value, _N_ANSWER)
        for depth, text, fact in zip(depths, asked, facts, strict=True)
    ]
    return Haystack(length, tokens, questions)


def _filler(tokenize: Tokenize, rng: random.Random, given: str | None, n_most: int) -> Iterator[list[int]]:
    """Sentences: of the text given, from anywhere in it and round its end; or made.

    What has no sentences, as code, comes in pieces of n_most tokens: needles lie where they should all the same.
    """
    if given is None:
        yield from (tokenize(sentence) for sentence in recall_text.make_sentences(rng))
    sentences = re.split(r"(?<=[.!?])\s+", " ".join((given or "").split()))
    start = rng.randrange(len(sentences))
    while True:
        for sentence in sentences[start:] + sentences[:start]:
            tokens = tokenize(f" {sentence}")
            yield from (tokens[i : i + n_most] for i in range(0, len(tokens), n_most))


def _make_facts(n: int, rng: random.Random) -> list[_Fact]:
    names: dict[str, None] = {}
    while len(names) < n:
        names[f"{rng.choice(_FIRST)} {rng.choice(_STARTS)}{rng.choice(_ENDS)}"] = None
    return [_Fact(name, str(rng.randrange(10**4, 10**5)), rng.randrange(len(_WORDINGS))) for name in names]


def describe(haystacks: Sequence[Haystack]) -> list[dict]:
    return [asdict(haystack) for haystack in haystacks]


def is_found(answer: str, expected: str) -> bool:
    """The value, whole, is what counts."""
    expected = expected.strip()
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer) is not None
