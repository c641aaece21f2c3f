"""Questions about facts hidden in a text, in the shape of the model's chat template, and how it answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tasks import LEAD_INS, MORE_RELATIONS, Fact, make_facts

if TYPE_CHECKING:
    from llama_cpp import Llama

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "</s>"
MOST_ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Needle:
    tokens: list[int]  # of the whole prompt
    position: int  # of the fact that is asked for
    fact: Fact


def tokenize(llm: Llama, text: str) -> list[int]:
    return llm.tokenize(text.encode(), add_bos=False, special=True)


def make_needle(llm: Llama, text: list[int], n_tokens: int, depth: float, n_facts: int, rng: random.Random) -> Needle:
    """A prompt of n_tokens, its filler cut from text; the fact asked for lies at depth, the others anywhere."""
    facts = make_facts(n_facts, rng, MORE_RELATIONS)
    wanted = facts[0]
    question = rng.choice(LEAD_INS) + wanted.question(rng)
    before = [llm.token_bos(), *tokenize(llm, f"{USER}\n")]
    after = tokenize(llm, f"\n\n{question}{END}\n{ASSISTANT}\n")
    said = [tokenize(llm, f" {fact.statement}") for fact in facts]
    n_filler = n_tokens - len(before) - len(after) - sum(map(len, said))
    start = rng.randrange(len(text) - n_filler)
    filler = text[start : start + n_filler]
    ending = {token for token in set(filler) if llm.detokenize([token]).endswith((b".", b"!", b"?"))}
    stops = [0, *(i + 1 for i, token in enumerate(filler) if token in ending)]
    cuts = [min(stops, key=lambda stop: abs(stop - depth * n_filler))]
    cuts += [rng.choice(stops) for _ in facts[1:]]
    tokens, at, position = before, 0, 0
    for cut, fact, statement in sorted(zip(cuts, facts, said, strict=True), key=lambda item: item[0]):
        tokens = tokens + filler[at:cut]
        position = len(tokens) if fact is wanted else position
        tokens, at = tokens + statement, cut
    return Needle(tokens + filler[at:] + after, position, wanted)


def ask(llm: Llama, needle: Needle) -> str:
    """What the model answers, greedily, from an empty cache."""
    llm.reset()
    llm.eval(needle.tokens)
    written: list[int] = []
    while len(written) < MOST_ANSWER_TOKENS:
        token = llm.sample(temp=0)
        if token == llm.token_eos():
            break
        written.append(token)
        llm.eval([token])
    return llm.detokenize(written).decode("utf-8", "replace").strip()
