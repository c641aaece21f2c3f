"""The small model's SentencePiece vocabulary."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable

import sentencepiece

from .needles import ASSISTANT, USER

BOS, EOS = 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ '<|user|>\\n' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train(texts: Iterable[str], n_vocab: int, seed: int) -> bytes:
    """A serialised model, the same for the same texts."""
    sentences = [line for text in texts for line in text.split("\n") if 20 < len(line) < 2000]
    random.Random(seed).shuffle(sentences)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences[:60000]),
        model_writer=model,
        vocab_size=n_vocab,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        user_defined_symbols=[USER, ASSISTANT],
        unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1,
        num_threads=4,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def load(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)
