"""Long texts with passphrases hidden in them, for the recall model: sentences of a small grammar, by seed.

The recall model continues a token with what followed it earlier. So that this has one answer, the words of a passphrase
occur nowhere else in the text, and the first of them ends the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .errors import UsageError
from .recall_vocab import BOS, EOS, PARAGRAPH, PHRASE_WORDS, STOP, token_ids, tokenize, tokens

MODEL_NAME = "monarch recall"  # by which `ab` knows it

VALUE_WORDS = 5
_ROOM_PER_NEEDLE = 64  # a passphrase's sentence and the end of the sentence before it

_BEFORE_KEY = " The passphrase is"

_SENTENCES = (
    "The {adj} {person} {verb} the {thing} {where} {when}.",
    "{When}, the {person} {verb} a {adj} {thing}.",
    "The {person} said that the {thing} was {adj}.",
    "There was a {adj} {thing} {where}, and the {person} {verb} it.",
    "No one knew why the {person} {verb} the {adj} {thing}.",
    "If you walk {where} {when}, you may see the {adj} {thing}.",
    "They waited {where} until the {person} {verb} the {thing}.",
    "It was a {adj} day, and the {person} was {where}.",
    "Every {person} in the {place} had heard of the {adj} {thing}.",
    "{When}, the wind stopped, and the {place} was {adj} again.",
    "She asked the {person} about the {thing}, but he said nothing.",
    "He had never been {where} before, and he liked the {adj} {place}.",
)

_SLOTS = {
    "adj": "young, happy, sad, tall, small, great, quiet, cold, warm, poor, rich, wise, slow, strong, little",
    "person": "farmer, king, miller, sailor, soldier, teacher, painter, judge, stranger, child, mother, father, friend",
    "verb": "opened, carried, found, bought, sold, counted, noticed, watched, kept, made, lost, mended, brought",
    "thing": "book, boat, letter, wheel, door, bread, coat, ring, horse, window, song, number, picture, table, clock",
    "place": "city, village, garden, forest, station, market, town, church, inn, school",
    "where": "by the river, near the mill, behind the church, at the market, under the bridge, on the hill, "
    "in the forest, across the street, at the station, above the inn, around the lake",
    "when": "in the morning, in the evening, before the storm, after the rain, every week, late at night, in summer, "
    "in winter, that year, last spring, at noon, one day",
}

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Needle:
    key: str
    value: tuple[str, ...]
    position: int  # of the key in the haystack's tokens; where it would have been when left out

    @property
    def sentence(self) -> str:
        return f"{_BEFORE_KEY} {' '.join((self.key, *self.value))}{STOP}"

    @property
    def question(self) -> str:
        """What follows the text. A chat may end it with a question mark, which the model's template drops."""
        return f"{PARAGRAPH}Which passphrase begins with {self.key}"

    @property
    def answer(self) -> str:
        return f" {' '.join(self.value)}{STOP}"

    def question_tokens(self) -> list[int]:
        return tokenize(self.question)

    def answer_tokens(self) -> list[int]:
        return [*tokenize(self.answer), token_ids()[EOS]]


@dataclass(frozen=True)
class Haystack:
    tokens: list[int]  # BOS first
    needles: tuple[Needle, ...]

    @property
    def text(self) -> str:
        return "".join(tokens()[token].text for token in self.tokens[1:])


def make_haystack(n_tokens: int, n_needles: int = 10, seed: int = 0, omit: Collection[int] = ()) -> Haystack:
    """Exactly n_tokens, BOS included; needle i lies in the middle of the i-th of n_needles equal parts.

    omit: indices of needles that the text leaves out but the result lists, as a control.
    """
    _check_size(n_tokens, n_needles)
    rng = random.Random(f"haystack {seed}")
    sentences = make_sentences(rng)
    out, needles = [token_ids()[BOS]], []
    for i, (key, *value) in enumerate(_draw_phrases(rng, n_needles)):
        _fill(out, (2 * i + 1) * n_tokens // (2 * n_needles), sentences)
        needle = Needle(key, tuple(value), len(out) + len(tokenize(_BEFORE_KEY)))
        out += [] if i in omit else tokenize(needle.sentence)
        needles.append(needle)
    _fill(out, n_tokens, sentences)
    return Haystack(out[:n_tokens], tuple(needles))


def _check_size(n_tokens: int, n_needles: int) -> None:
    most = len(PHRASE_WORDS) // (1 + VALUE_WORDS)
    if not 1 <= n_needles <= most:
        raise UsageError(f"{n_needles} passphrases: the recall model has words for 1 to {most}")
    if n_tokens < n_needles * _ROOM_PER_NEEDLE:
        raise UsageError(
            f"{n_tokens} tokens cannot hold {n_needles} passphrases: ask for {n_needles * _ROOM_PER_NEEDLE}"
        )


def _draw_phrases(rng: random.Random, n: int) -> list[list[str]]:
    width = 1 + VALUE_WORDS
    words = rng.sample(PHRASE_WORDS, n * width)
    return [words[i : i + width] for i in range(0, n * width, width)]


def _fill(out: list[int], n_tokens: int, sentences: Iterator[str]) -> None:
    while len(out) < n_tokens:
        out += tokenize(next(sentences))


def make_sentences(rng: random.Random) -> Iterator[str]:
    """Without end, in paragraphs of six."""
    yield _sentence(rng)
    while True:
        for _ in range(5):
            yield f" {_sentence(rng)}"
        yield PARAGRAPH + _sentence(rng)


def _sentence(rng: random.Random) -> str:
    text = _SLOT.sub(lambda match: _draw_slot(rng, match[1]), rng.choice(_SENTENCES))
    return text[0].upper() + text[1:]


def _draw_slot(rng: random.Random, name: str) -> str:
    return rng.choice(_SLOTS[name.lower()].split(", "))
