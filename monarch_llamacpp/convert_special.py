"""Special tokens, whether a text begins and ends with them, and the chat template, from all files that may say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from .convert_source import read_json, read_text

# what config files call them; a GGUF has no place for cls, but it decides what a text begins with
KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("bos", "eos", "sep")


@dataclass
class Special:
    texts: dict[str, str | None]
    adds: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None


def read_special(folder: Path, n_vocab: int) -> Special:
    """A post-processor outranks add_..._token, and the tokens' texts outrank the ids in config.json."""
    tokenizer, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    res = Special({kind: token_text(config.get(f"{kind}_token")) for kind in KINDS})
    res.texts["bos"] = res.texts["bos"] or res.texts["cls"]
    res.texts["eos"] = res.texts["eos"] or res.texts["sep"]
    for step in steps_of(tokenizer.get("post_processor"), "processors"):
        read_post_processor(step, res)
    for kind in FLAGS:
        if isinstance(config.get(f"add_{kind}_token"), bool):
            res.adds.setdefault(kind, config[f"add_{kind}_token"])
    res.ids = find_ids(tokenizer, read_json(folder / "config.json"), res.texts, n_vocab)
    res.chat_template = read_chat_template(folder, config)
    return res


def token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def steps_of(step: dict | None, members: str) -> list[dict]:
    """The steps of a sequence in tokenizer.json, or the one step that is none."""
    return step.get(members, [step]) if step else []


def read_post_processor(step: dict, special: Special) -> None:
    if step.get("type") == "ByteLevel":
        special.adds.setdefault("bos", False)
        special.adds.setdefault("eos", False)
    if step.get("type") == "TemplateProcessing":
        single = step.get("single") or []
        first, last = (template_text(single[0]), template_text(single[-1])) if len(single) > 1 else (None, None)
        read_single(first, last, special)
        read_pair(step.get("pair") or [], first, last, special)


def template_text(piece: dict) -> str | None:
    return piece.get("SpecialToken", {}).get("id")


def template_sequence(piece: dict) -> str | None:
    return piece.get("Sequence", {}).get("id")


def read_single(first: str | None, last: str | None, special: Special) -> None:
    texts = special.texts
    if first:
        if first not in (texts["bos"], texts["cls"]):
            texts["bos"], texts["cls"] = texts["bos"] or first, texts["cls"] or first
        special.adds["bos"] = first in (texts["bos"], texts["cls"])
    if last:
        if last != texts["eos"]:  # then eos_token ends a turn, not a text
            texts["eot"], texts["eos"] = texts["eos"], last
        special.adds["eos"] = True


def read_pair(pair: list[dict], first: str | None, last: str | None, special: Special) -> None:
    """[first] A [separator] [end] B [last]"""
    texts = special.texts
    if first and pair and template_text(pair[0]) == first:
        pair = pair[1:]
    if last and pair and template_text(pair[-1]) == last:
        pair = pair[:-1]
    between = pair[1:-1]
    if not between or template_sequence(pair[0]) != "A" or template_sequence(pair[-1]) != "B":
        return
    separates = [text is not None and text in (texts["sep"], texts["eos"]) for text in map(template_text, between)]
    special.adds["sep"] = (separates[0] and not last) or (len(separates) == 2 and separates[1])
    if special.adds["sep"] and not texts["sep"]:
        texts["sep"] = texts["eos"]


def find_ids(tokenizer: dict, config: dict, texts: dict[str, str | None], n_vocab: int) -> dict[str, int]:
    """Tokens that the embedding has no row for do not exist."""
    ids: dict[str, int] = {}
    for entry in reversed(tokenizer.get("added_tokens") or []):
        ids[entry["content"]] = entry["id"]
    res = {}
    for kind, text in texts.items():
        for i in (ids.get(text), config.get(f"{kind}_token_id")):
            if isinstance(i, int) and i < 0:
                raise ValueError(f"the {kind} token has the id {i}")
            if isinstance(i, int) and i < n_vocab:
                res.setdefault(kind, i)
    return res


def read_chat_template(folder: Path, config: dict) -> str | list[dict[str, str]] | None:
    template = config.get("chat_template")
    if template is None:
        template = read_text(folder / "chat_template.jinja")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if template is None:
        return None
    parts = [template]
    if isinstance(template, list):
        parts = [part for entry in template for part in (entry["name"], entry["template"])]
    for part in parts:
        part.encode("utf-8")  # text, and one that UTF-8 can hold
    return template


def add_special(writer: gguf.GGUFWriter, special: Special) -> None:
    for kind, i in special.ids.items():
        if kind != "cls":
            getattr(writer, f"add_{kind}_token_id")(i)
    for kind, value in special.adds.items():
        getattr(writer, f"add_add_{kind}_token")(value)
    if special.chat_template is not None:
        writer.add_chat_template(special.chat_template)
