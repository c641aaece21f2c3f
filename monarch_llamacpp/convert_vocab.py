"""SentencePiece and tokenizer.json vocabularies as GGUF wants them: texts, scores, types, special tokens, template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gguf

from .convert_hparams import Hparams
from .convert_source import first_line, read_json
from .errors import MonarchError

# by the regular expression that cuts text into words: llama.cpp's name of the same cut
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": name
    for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2"))
}

ADDED_SCORE = -1000.0
PAD_SCORE = -10000.0

# added tokens that are control tokens although their files do not say so
CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
CONTROL_AFFIXES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


@dataclass
class Vocab:
    model: str  # llama or gpt2
    pre: str
    tokens: list[bytes]
    scores: list[float] | None
    types: list[int]
    special: gguf.SpecialVocab
    add_space_prefix: bool | None


def read_vocab(folder: Path, hparams: Hparams) -> Vocab:
    try:
        if (folder / "tokenizer.model").is_file():
            return read_sentencepiece(folder, hparams)
        if (folder / "tokenizer.json").is_file():
            return read_tokenizer_json(folder, hparams)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MonarchError(f"{folder}: the tokenizer is not as expected ({first_line(error)})") from error
    raise MonarchError(f"{folder} has neither tokenizer.model nor tokenizer.json; fetch the whole checkpoint")


def read_sentencepiece(folder: Path, hparams: Hparams) -> Vocab:
    import sentencepiece

    path = folder / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(path))
    except (RuntimeError, OSError) as error:
        raise MonarchError(f"{path} is not a SentencePiece model; fetch it again") from error
    vocab = empty_vocab(folder, hparams, "llama", "default")
    for i in range(min(pieces.vocab_size(), hparams.n_vocab)):
        vocab.tokens[i] = pieces.id_to_piece(i).encode()
        vocab.scores[i] = pieces.get_score(i)
        vocab.types[i] = piece_type(pieces, i)
    add_added_tokens(folder, vocab)
    return vocab


def piece_type(pieces, i: int) -> int:
    if pieces.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(i):
        return gguf.TokenType.CONTROL
    if pieces.is_unused(i):
        return gguf.TokenType.UNUSED
    return gguf.TokenType.BYTE if pieces.is_byte(i) else gguf.TokenType.NORMAL


def empty_vocab(folder: Path, hparams: Hparams, model: str, pre: str) -> Vocab:
    """Rows of the embedding that no token names are padding."""
    n_vocab = hparams.n_vocab
    prefix = read_json(folder / "tokenizer_config.json").get("add_prefix_space")
    return Vocab(
        model=model,
        pre=pre,
        tokens=[f"[PAD{i}]".encode() for i in range(n_vocab)],
        scores=[PAD_SCORE] * n_vocab if model == "llama" else None,
        types=[gguf.TokenType.UNUSED] * n_vocab,
        special=read_special(folder, n_vocab, load_merges=model == "gpt2"),
        add_space_prefix=prefix if hparams.arch == "llama" and isinstance(prefix, bool) else None,
    )


def read_special(folder: Path, n_vocab: int, load_merges: bool) -> gguf.SpecialVocab:
    return gguf.SpecialVocab(folder, load_merges=load_merges, n_vocab=n_vocab)


def add_added_tokens(folder: Path, vocab: Vocab) -> None:
    added = read_json(folder / "added_tokens.json")
    for text, i in added.items():
        set_added(vocab, i, text, gguf.TokenType.USER_DEFINED)
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for i, entry in decoder.items():
        set_added(vocab, int(i), entry["content"], added_type(entry))


def added_type(entry: dict) -> int:
    text = entry["content"]
    looks_special = text in CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in CONTROL_AFFIXES)
    return gguf.TokenType.CONTROL if entry.get("special") or looks_special else gguf.TokenType.USER_DEFINED


def set_added(vocab: Vocab, i: int, text: str, kind: int) -> None:
    if not isinstance(i, int) or i < 0:
        raise ValueError(f"the added token {text!r} has the id {i!r}")
    if i >= len(vocab.tokens):
        return  # the embedding has no row for it
    if kind == gguf.TokenType.USER_DEFINED:
        text = text.replace("\u2581", " ")
    vocab.tokens[i] = text.encode()
    vocab.types[i] = kind
    if vocab.scores is not None:
        vocab.scores[i] = ADDED_SCORE


def read_tokenizer_json(folder: Path, hparams: Hparams) -> Vocab:
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise MonarchError(f"{path}: a {model['type']} tokenizer is not supported, only BPE")
    by_bytes = bool(model.get("byte_fallback"))
    vocab = empty_vocab(folder, hparams, *(("llama", "default") if by_bytes else ("gpt2", find_pre(path, tokenizer))))
    for text, i in model["vocab"].items():
        if not isinstance(i, int) or not 0 <= i < hparams.n_vocab:
            raise MonarchError(f"{path}: the token {text!r} has the id {i!r}; the embedding has {hparams.n_vocab} rows")
        vocab.tokens[i] = text.encode()
        vocab.types[i] = gguf.TokenType.BYTE if by_bytes and is_byte(text) else gguf.TokenType.NORMAL
        if vocab.scores is not None:
            vocab.scores[i] = -float(i)  # a SentencePiece BPE numbers its pieces by rank
    for entry in tokenizer.get("added_tokens") or []:
        kind = gguf.TokenType.UNKNOWN if entry["content"] == model.get("unk_token") else added_type(entry)
        set_added(vocab, entry["id"], entry["content"], kind)
    return vocab


def is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def find_pre(path: Path, tokenizer: dict) -> str:
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    pre = PRE_TOKENIZERS.get(patterns[0]) if len(patterns) == 1 else None
    if pre is None:
        raise MonarchError(f"{path}: this way of cutting words is unknown: {json.dumps(patterns or kinds)[:200]}")
    return pre


def add_vocab(writer: gguf.GGUFWriter, vocab: Vocab) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    if vocab.add_space_prefix is not None:
        writer.add_add_space_prefix(vocab.add_space_prefix)
    vocab.special.add_to_gguf(writer, quiet=True)
