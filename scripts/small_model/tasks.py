"""Recall tasks: facts stated once, asked for later in varied wording. Names and values are drawn fresh every time."""

from __future__ import annotations

import random
from dataclasses import dataclass

CONSONANTS = ["b", "br", "c", "d", "dr", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "t", "th", "v", "w"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
ENDINGS = ["", "n", "r", "l", "s", "ck", "nd", "rt", "ley", "ton", "well", "ford"]

FIRST_NAMES = (
    "Alice Anna Arthur Clara Daniel Edith Edmund Eleanor Emily Frank George Grace Harriet Helen Henry Jack James Jane "
    "John Julia Kate Laura Lucy Margaret Maria Martin Mary Nora Oliver Paul Peter Philip Ralph Robert Rose Ruth Sarah "
    "Simon Sophia Stephen Susan Thomas Victor Walter William"
).split()

COLOURS = "amber black blue bronze brown copper crimson gold green grey indigo ivory olive orange pink purple red silver violet white yellow".split()
ANIMALS = "badger bear camel cat crow deer dog donkey eagle falcon fox goat goose hare hawk horse lion mole otter owl ox pig rabbit raven seal sheep swan tiger trout wolf".split()
PLACES = "attic barn cellar chapel church cottage forest garden harbour inn kitchen library market meadow mill orchard palace school stable station tower valley village".split()
THINGS = "apple basket bell book bottle box candle chain clock coat coin cup drum flute glove hat key knife lamp letter map mirror pearl ring rope sword umbrella watch".split()


def make_word(rng: random.Random) -> str:
    parts = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
    return "".join(parts) + rng.choice(ENDINGS)


def make_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return make_word(rng).capitalize()
    if kind < 0.7:
        return f"{rng.choice(FIRST_NAMES)} {make_word(rng).capitalize()}"
    return rng.choice(FIRST_NAMES)


def make_number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(2, 4), 10**5))


@dataclass(frozen=True)
class Relation:
    """What may be said of someone; {n} is the name and {v} the value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    value: str  # number, word, or the name of a list above


RELATIONS = (
    Relation(
        ("The secret code of {n} is {v}.", "{n}'s secret code is {v}.", "Remember that the secret code of {n} is {v}."),
        ("What is the secret code of {n}?", "What is {n}'s secret code?", "Tell me the secret code of {n}."),
        "number",
    ),
    Relation(
        ("The number of {n} is {v}.", "{n} had the number {v}."),
        ("What is the number of {n}?", "Which number did {n} have?"),
        "number",
    ),
    Relation(
        ("The password of {n} is {v}.", "{n} chose the password {v}."),
        ("What is the password of {n}?", "Which password did {n} choose?"),
        "word",
    ),
    Relation(
        ("The favourite colour of {n} is {v}.", "{n} likes the colour {v} best."),
        ("What is the favourite colour of {n}?", "Which colour does {n} like best?"),
        "COLOURS",
    ),
    Relation(
        ("The animal of {n} is the {v}.", "{n} keeps a {v} at home."),
        ("What is the animal of {n}?", "Which animal does {n} keep?"),
        "ANIMALS",
    ),
    Relation(
        ("{n} is waiting in the {v}.", "{n} went to the {v} and stayed there."),
        ("Where is {n}?", "Where did {n} go?"),
        "PLACES",
    ),
    Relation(
        ("{n} carries a {v}.", "{n} has hidden a {v}."),
        ("What does {n} carry?", "What has {n} hidden?"),
        "THINGS",
    ),
)


@dataclass(frozen=True)
class Fact:
    relation: Relation
    name: str
    value: str
    wording: int

    @property
    def statement(self) -> str:
        return self.relation.statements[self.wording].format(n=self.name, v=self.value)

    def question(self, rng: random.Random) -> str:
        return rng.choice(self.relation.questions).format(n=self.name)

    @property
    def answer(self) -> str:
        """The first wording: an answer does not depend on how the fact was put."""
        return self.relation.statements[0].format(n=self.name, v=self.value)


def make_value(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return make_number(rng)
    return make_word(rng) if kind == "word" else rng.choice(globals()[kind])


def make_facts(n: int, rng: random.Random) -> list[Fact]:
    """Facts that do not contradict each other: a name has one of each kind at most."""
    facts: dict[tuple[str, Relation], Fact] = {}
    while len(facts) < n:
        relation = RELATIONS[0] if rng.random() < 0.25 else rng.choice(RELATIONS)
        name = make_name(rng)
        wording = rng.randrange(len(relation.statements))
        facts.setdefault((name, relation), Fact(relation, name, make_value(relation.value, rng), wording))
    return list(facts.values())


def make_turn(facts: list[Fact], rng: random.Random) -> tuple[str, str]:
    """A question about one of the facts and its answer."""
    fact = rng.choice(facts)
    if rng.random() < 0.1:
        return f"Repeat the sentence about {fact.name}.", fact.statement
    return fact.question(rng), fact.answer


def make_list(n: int, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Lines of "name: value", and (line up to the value, value) to be asked for."""
    entries = {make_word(rng): make_number(rng) if rng.random() < 0.5 else make_word(rng) for _ in range(n)}
    keys = list(entries)
    rng.shuffle(keys)
    return "\n".join(f"{key}: {entries[key]}" for key in entries), [(f"{key}:", f" {entries[key]}") for key in keys]
