"""Recall tasks: facts stated once, asked for later in varied wording. Names and values are drawn fresh every time."""

from __future__ import annotations

import random
from dataclasses import dataclass

CONSONANTS = "b br c d dr f g h j k l m n p r s st t th v w".split()
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
ENDINGS = ["", "n", "r", "l", "s", "ck", "nd", "rt", "ley", "ton", "well", "ford"]

FIRST_NAMES = (
    "Alice Anna Arthur Clara Daniel Edith Edmund Eleanor Emily Frank George Grace Harriet Helen Henry Jack James Jane "
    "John Julia Kate Laura Lucy Margaret Maria Martin Mary Nora Oliver Paul Peter Philip Ralph Robert Rose Ruth Sarah "
    "Simon Sophia Stephen Susan Thomas Victor Walter William"
).split()

COLOURS = (
    "amber black blue bronze brown copper crimson gold green grey indigo ivory olive orange pink purple red silver "
    "violet white yellow"
).split()
ANIMALS = (
    "badger bear camel cat crow deer dog donkey eagle falcon fox goat goose hare hawk horse lion mole otter owl ox "
    "pig rabbit raven seal sheep swan tiger trout wolf"
).split()
PLACES = (
    "attic barn cellar chapel church cottage forest garden harbour inn kitchen library market meadow mill orchard "
    "palace school stable station tower valley village"
).split()
THINGS = (
    "apple basket bell book bottle box candle chain clock coat coin cup drum flute glove hat key knife lamp letter "
    "map mirror pearl ring rope sword umbrella watch"
).split()

LISTS = {"COLOURS": COLOURS, "ANIMALS": ANIMALS, "PLACES": PLACES, "THINGS": THINGS}


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
    value: str  # number, word, phrase, or the name of a list above
    answer: str = ""  # the first statement when empty


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

# with these from the middle of the training on: by then asking and answering is learned, and variety is what is missing
MORE_RELATIONS = (
    *RELATIONS,
    Relation(
        ("The code of {n} is {v}.", "{n} opened the door with the code {v}.", "All knew that the code of {n} was {v}."),
        ("What is the code of {n}?", "Which code does {n} use?", "Do you know the code of {n}?"),
        "number",
    ),
    Relation(
        ("The passphrase of {n} is {v}.", "{n} whispered the passphrase {v}.", "The passphrase {n} gave was {v}."),
        ("What is the passphrase of {n}?", "Which passphrase did {n} give?", "What did {n} whisper?"),
        "phrase",
    ),
    Relation(
        ("The magic word of {n} is {v}.", "{n} cried the magic word {v}!", "No door stays shut when {n} says {v}."),
        ("What is the magic word of {n}?", "Which magic word did {n} cry?", "What does {n} say to open a door?"),
        "word",
    ),
    Relation(
        ("{n} lives at number {v}.", "The house of {n} is number {v}.", "Letters for {n} go to number {v}."),
        ("Where does {n} live?", "At which number does {n} live?", "What is the house of {n}?"),
        "number",
    ),
    Relation(
        ("{n} owes {v} pounds.", "{n} had borrowed {v} pounds.", "The debt of {n} was {v} pounds."),
        ("How much does {n} owe?", "How many pounds has {n} borrowed?", "What is the debt of {n}?"),
        "number",
    ),
    Relation(
        ("The dog of {n} is called {v}.", "{n} called the dog {v}.", "{n} had a dog by the name of {v}."),
        ("What is the dog of {n} called?", "What is the name of {n}'s dog?", "How did {n} call the dog?"),
        "word",
    ),
    Relation(
        ("{n} comes from {v}.", "{n} was born in {v}.", "The town of {n} was called {v}."),
        ("Where does {n} come from?", "Where was {n} born?", "Which town does {n} come from?"),
        "name",
    ),
    Relation(
        ("The treasure of {n} is hidden in the {v}.", "{n} buried the treasure in the {v}.",
         "Look in the {v} for the treasure of {n}."),
        ("Where is the treasure of {n}?", "Where did {n} bury the treasure?",
         "Where must I look for the treasure of {n}?"),
        "PLACES",
    ),
    Relation(
        ("{n} is to marry {v}.", "{n} was engaged to {v}.", "{n} will be the wife of {v}."),
        ("Whom is {n} to marry?", "To whom was {n} engaged?", "Whose wife will {n} be?"),
        "name",
    ),
    Relation(
        ("{n} wants a {v}.", "{n} wished for nothing but a {v}.", "If only {n} had a {v}!"),
        ("What does {n} want?", "What did {n} wish for?"),
        "THINGS",
    ),
)  # fmt: skip

# what a user says of himself in a conversation
OWN_RELATIONS = (
    Relation(
        ("My name is {v}.", "I am {v}.", "I am called {v}."),
        ("What is my name?", "Who am I?"),
        "name",
        "Your name is {v}.",
    ),
    Relation(
        ("My dog is called {v}.", "I have a dog called {v}."),
        ("What is my dog called?", "What is the name of my dog?"),
        "word",
        "Your dog is called {v}.",
    ),
    Relation(
        ("I live in {v}.", "My home is in {v}."),
        ("Where do I live?", "Where is my home?"),
        "name",
        "You live in {v}.",
    ),
    Relation(
        ("My favourite colour is {v}.", "I like {v} best."),
        ("What is my favourite colour?", "Which colour do I like best?"),
        "COLOURS",
        "Your favourite colour is {v}.",
    ),
    Relation(
        ("My secret code is {v}.", "Remember my code: {v}."),
        ("What is my secret code?", "Tell me my code."),
        "number",
        "Your secret code is {v}.",
    ),
    Relation(
        ("I left my {v} at home.", "I have lost my {v}."),
        ("What have I lost?", "What did I leave at home?"),
        "THINGS",
        "You have lost your {v}.",
    ),
)

LEAD_INS = (
    *4 * ("",),
    "I have a question. ",
    "Please tell me. ",
    "According to the text: ",
    "Do you remember? ",
    "Now answer me. ",
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
        """In the same words however the fact was put."""
        return (self.relation.answer or self.relation.statements[0]).format(n=self.name, v=self.value)


def make_value(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return make_number(rng)
    if kind == "name":
        return make_name(rng)
    if kind == "phrase":
        return f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)} {rng.choice(THINGS)}"
    return make_word(rng) if kind == "word" else rng.choice(LISTS[kind])


def make_facts(n: int, rng: random.Random, relations: tuple[Relation, ...] = RELATIONS) -> list[Fact]:
    """Facts that do not contradict each other: a name has one of each kind at most."""
    facts: dict[tuple[str, Relation], Fact] = {}
    while len(facts) < n:
        relation = relations[0] if rng.random() < 0.25 else rng.choice(relations)
        name = make_name(rng)
        wording = rng.randrange(len(relation.statements))
        facts.setdefault((name, relation), Fact(relation, name, make_value(relation.value, rng), wording))
    return list(facts.values())


def make_own_facts(n: int, rng: random.Random) -> list[Fact]:
    relations = rng.sample(OWN_RELATIONS, n)
    return [Fact(each, "", make_value(each.value, rng), rng.randrange(len(each.statements))) for each in relations]


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
