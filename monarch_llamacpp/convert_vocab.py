"""SentencePiece and tokenizer.json vocabularies as GGUF wants them: texts, scores, types, merges, padding."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import gguf

from .convert_hparams import Hparams
from .convert_sentencepiece import read_pieces
from .convert_source import first_line, read_json, read_text
from .convert_special import Special, add_special, read_special, steps_of
from .errors import MonarchError

LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_CUT = LLAMA3_CUT.replace("{1,3}", "")
TEKKEN_CUT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# by the expression that cuts text into words, and whether a word that is a token is taken as it is: llama.cpp's name
PRE_TOKENIZERS = {
    (LLAMA3_CUT, True): "llama-bpe",
    (LLAMA3_CUT, False): "smaug-bpe",
    (QWEN2_CUT, False): "qwen2",
    (TEKKEN_CUT, True): "tekken",
}

ADDED_SCORE = -1000.0
PAD_SCORE = -10000.0

# added tokens that are control tokens although their files do not say so
CONTROL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass
class Vocab:
    model: str  # llama or gpt2
    pre: str
    special: Special
    add_space_prefix: bool | None
    tokens: list[bytes]
    types: list[int]
    scores: list[float]
    merges: list[str]


def read_vocab(folder: Path, hparams: Hparams) -> Vocab:
    path = folder / "tokenizer.json"
    try:
        if (folder / "tokenizer.model").exists():
            return read_sentencepiece(folder, hparams)
        tokenizer = read_json(path)
        if not tokenizer:
            raise MonarchError(f"{folder} has neither tokenizer.model nor tokenizer.json; fetch the whole checkpoint")
        if tokenizer["model"].get("type", "BPE") != "BPE":
            raise MonarchError(f"{path}: a {tokenizer['model']['type']} tokenizer is not supported, only BPE")
        if tokenizer["model"].get("byte_fallback"):
            return read_byte_fallback(folder, tokenizer, hparams)
        return read_bpe(folder, tokenizer, hparams)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MonarchError(f"{folder}: the tokenizer is not as expected ({first_line(error)})") from error


def empty_vocab(folder: Path, hparams: Hparams, model: str, pre: str) -> Vocab:
    """Rows of the embedding that no token names are padding."""
    n_vocab = hparams.n_vocab
    prefix = read_json(folder / "tokenizer_config.json").get("add_prefix_space")
    return Vocab(
        model=model,
        pre=pre,
        special=read_special(folder, n_vocab),
        add_space_prefix=prefix if hparams.arch == "llama" and isinstance(prefix, bool) else None,
        tokens=[f"[PAD{i}]".encode() for i in range(n_vocab)],
        types=[gguf.TokenType.UNUSED] * n_vocab,
        scores=[PAD_SCORE] * n_vocab,
        merges=[],
    )


def set_token(vocab: Vocab, i: int, text: str, kind: int, score: float = 0.0) -> None:
    if not isinstance(i, int) or not 0 <= i < len(vocab.tokens):
        raise ValueError(f"the token {text!r} has the id {i!r}, and the embedding {len(vocab.tokens)} rows")
    vocab.tokens[i] = text.encode()
    vocab.types[i] = kind
    vocab.scores[i] = score


def set_added(vocab: Vocab, i: int, entry: dict) -> None:
    """An added token; llama.cpp wants its text as it stands in texts."""
    text = entry["content"]
    if entry.get("special") or CONTROL.fullmatch(text):
        set_token(vocab, i, text, gguf.TokenType.CONTROL, ADDED_SCORE)
    else:
        set_token(vocab, i, text.replace("\u2581", " "), gguf.TokenType.USER_DEFINED, ADDED_SCORE)


def read_sentencepiece(folder: Path, hparams: Hparams) -> Vocab:
    """Pieces and added tokens beyond the embedding are dropped: nothing can produce them."""
    vocab = empty_vocab(folder, hparams, "llama", "default")
    for i, piece in enumerate(read_pieces(folder / "tokenizer.model")[: hparams.n_vocab]):
        vocab.tokens[i], vocab.types[i], vocab.scores[i] = piece.text, piece.type, piece.score
    for text, i in read_json(folder / "added_tokens.json").items():
        if i < hparams.n_vocab:
            set_token(vocab, i, text, gguf.TokenType.USER_DEFINED, ADDED_SCORE)
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for i, entry in decoder.items():
        if int(i) < hparams.n_vocab:
            set_added(vocab, int(i), entry)
    return vocab


def read_byte_fallback(folder: Path, tokenizer: dict, hparams: Hparams) -> Vocab:
    """A SentencePiece BPE without its model. Its scores are the order of its merges, which upstream does not tell."""
    vocab = empty_vocab(folder, hparams, "llama", "default")
    merges = read_merges(folder, tokenizer)
    ranks = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
    for text, i in tokenizer["model"]["vocab"].items():
        kind = gguf.TokenType.BYTE if BYTE.fullmatch(text) else gguf.TokenType.NORMAL
        set_token(vocab, i, text, kind, -float(ranks.get(text, len(merges))))
    for entry in tokenizer.get("added_tokens") or []:
        set_added(vocab, entry["id"], entry)
    return vocab


def read_bpe(folder: Path, tokenizer: dict, hparams: Hparams) -> Vocab:
    vocab = empty_vocab(folder, hparams, "gpt2", find_pre(folder / "tokenizer.json", tokenizer))
    for text, i in tokenizer["model"]["vocab"].items():
        set_token(vocab, i, text, gguf.TokenType.NORMAL)
    for entry in tokenizer.get("added_tokens") or []:
        set_added(vocab, entry["id"], entry)
    vocab.merges = read_merges(folder, tokenizer)
    return vocab


def read_merges(folder: Path, tokenizer: dict) -> list[str]:
    """As "left right"; newer files hold pairs, whose parts may contain a space."""
    merges = tokenizer["model"].get("merges") or read_merges_txt(folder)
    res = [m if isinstance(m, str) else " ".join(part.replace(" ", "\u0120") for part in m) for m in merges]
    for merge in res:
        if len(merge.encode().split(b" ")) != 2:
            raise ValueError(f"the merge {merge!r} is not of two parts")
    return res


def read_merges_txt(folder: Path) -> list[str]:
    lines = (read_text(folder / "merges.txt") or "").split("\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith("#version")]


def find_pre(path: Path, tokenizer: dict) -> str:
    """llama.cpp's name for the way of cutting words; upstream knows it by a hash of one text's tokens."""
    normalizer = tokenizer.get("normalizer") or {}
    if normalizer and normalizer.get("type") != "NFC":
        raise MonarchError(f"{path}: the normalizer {normalizer.get('type')} is not supported")
    steps = steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers")
    *cuts, level = steps or [{}]
    by_level = level.get("use_regex", True)
    pre = None
    if level.get("type") == "ByteLevel" and not level.get("add_prefix_space", True):
        pre = name_cut(cuts, by_level, bool(tokenizer["model"].get("ignore_merges")))
    if pre is None:
        raise MonarchError(f"{path}: this pre-tokenizer is not supported: {json.dumps(steps)[:300]}")
    return pre


def name_cut(cuts: list[dict], by_level: bool, ignore_merges: bool) -> str | None:
    if not cuts:
        return "gpt-2" if by_level else None
    cut = cuts[0]
    if len(cuts) > 1:
        return None
    if cut.get("type") == "Digits":
        return "smollm" if cut.get("individual_digits") and by_level else None
    isolates = cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut.get("invert")
    return PRE_TOKENIZERS.get((cut["pattern"].get("Regex"), ignore_merges)) if isolates and not by_level else None


def add_vocab(writer: gguf.GGUFWriter, vocab: Vocab) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.model == "llama":
        writer.add_token_scores(vocab.scores)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    if vocab.add_space_prefix is not None:
        writer.add_add_space_prefix(vocab.add_space_prefix)
    add_special(writer, vocab.special)
