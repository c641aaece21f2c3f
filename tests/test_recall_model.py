"""The constructed recall model, on the stock library: it answers every passphrase, and from nothing but the circuit."""

import argparse
from pathlib import Path

import jinja2
import numpy as np
import pytest
from child import run_child_json

from monarch_llamacpp import recall
from monarch_llamacpp.errors import UsageError
from monarch_llamacpp.recall_text import make_haystack
from monarch_llamacpp.recall_vocab import PHRASE_WORDS, codes, token_ids, tokenize, tokens


@pytest.fixture(scope="module")
def recall_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recall") / "recall.gguf"
    recall.write_recall_model(path)
    return path


def ask(lib_dir: Path, model: Path, **options: object) -> dict:
    args = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return run_child_json(lib_dir, "child_recall.py", [model, *args])


def wrong(report: dict) -> list[dict]:
    return [needle for needle in report["needles"] if not needle["correct"]]


def test_codes_of_different_words_hardly_overlap():
    used = codes()[: 1 + max(token.code for token in tokens())]
    overlap = used @ used.T - np.eye(len(used))
    assert np.abs(overlap).max() == pytest.approx(1 / 8)


def test_only_spellings_of_one_word_share_a_code():
    words = {}
    for token in tokens():
        words.setdefault(token.code, set()).add(token.text.strip(" ").lower() if len(token.text) > 1 else token.text)
    shared = {code: texts for code, texts in words.items() if len(texts) > 1}
    assert not shared


@pytest.mark.parametrize(("n_tokens", "n_needles"), [(640, 10), (64, 1), (4096, 10), (16384, 20)])
def test_haystack_is_as_long_as_asked_with_a_needle_in_every_part(n_tokens, n_needles):
    haystack = make_haystack(n_tokens, n_needles, seed=3)
    assert len(haystack.tokens) == n_tokens
    assert tokenize(haystack.text) == haystack.tokens[1:]
    for i, needle in enumerate(haystack.needles):
        phrase = tokenize(f" {needle.key}") + needle.answer_tokens()[:-1]
        assert haystack.tokens[needle.position : needle.position + len(phrase)] == phrase
        assert needle.position * n_needles // n_tokens == i


def test_passphrase_words_occur_once():
    haystack = make_haystack(8192, seed=1)
    rare = [token for token in haystack.tokens if tokens()[token].rare]
    assert len(rare) == len(set(rare)) == 60


def test_haystack_is_its_seed_s_and_may_omit_needles():
    assert make_haystack(2048, seed=5) == make_haystack(2048, seed=5)
    assert make_haystack(2048, seed=5).text != make_haystack(2048, seed=6).text
    whole, holed = make_haystack(2048), make_haystack(2048, omit=[4])
    assert [needle.answer for needle in whole.needles] == [needle.answer for needle in holed.needles]
    assert token_ids()[f" {whole.needles[4].key}"] not in holed.tokens


@pytest.mark.parametrize(("n_tokens", "n_needles"), [(639, 10), (4096, 0), (4096, len(PHRASE_WORDS) // 6 + 1)])
def test_haystack_that_cannot_be_is_refused(n_tokens, n_needles):
    with pytest.raises(UsageError):
        make_haystack(n_tokens, n_needles)


@pytest.mark.parametrize("n_tokens", [4096, 16384, pytest.param(65536, marks=pytest.mark.long)])
def test_stock_finds_every_needle(stock_bin, recall_model, n_tokens):
    report = ask(stock_bin, recall_model, tokens=n_tokens)
    assert report["tokenizes"]
    assert len(report["needles"]) == 10
    assert wrong(report) == []


def test_stock_finds_every_needle_in_a_4_bit_cache(stock_bin, recall_model):
    report = ask(stock_bin, recall_model, tokens=4096, kv_type="q4_0", flash_attn=1)
    assert wrong(report) == []


def test_stock_finds_every_needle_with_shared_kv_heads(stock_bin, tmp_path):
    recall.write_recall_model(tmp_path / "gqa.gguf", n_head=4, n_head_kv=2)
    assert wrong(ask(stock_bin, tmp_path / "gqa.gguf", tokens=1024)) == []


def test_a_needle_that_is_not_there_is_unknown(stock_bin, recall_model):
    report = ask(stock_bin, recall_model, tokens=1024, omit=6)
    assert [(needle["key"], needle["written"]) for needle in wrong(report)] == [
        (make_haystack(1024).needles[6].key, " unknown")
    ]


def test_template_puts_the_key_last_and_keeps_what_was_decoded():
    haystack = make_haystack(640)
    needle = haystack.needles[0]
    messages = [
        {"role": "system", "content": haystack.text},
        {"role": "user", "content": needle.question.strip() + "?"},
    ]
    template = jinja2.Template(recall.CHAT_TEMPLATE)
    prompt = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert prompt == f"<s>{haystack.text}{needle.question}"
    messages.append({"role": "assistant", "content": needle.answer.strip()})
    assert template.render(messages=messages, bos_token="<s>", eos_token="</s>") == f"{prompt}{needle.answer}</s>"


def test_model_is_the_same_every_time_and_refuses_odd_heads(recall_model, tmp_path):
    recall.write_recall_model(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == recall_model.read_bytes()
    with pytest.raises(UsageError, match="3 query heads"):
        recall.write_recall_model(tmp_path / "odd.gguf", n_head=3, n_head_kv=2)


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    def run_out_of_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recall, "_tensors", run_out_of_space)  # the part file is open by then
    with pytest.raises(OSError, match="No space"):
        recall.write_recall_model(tmp_path / "recall.gguf")
    assert list(tmp_path.iterdir()) == []


def test_command_writes_model_text_and_questions(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    recall.add_arguments(parser)
    text = tmp_path / "long.txt"
    args = ["-o", str(tmp_path / "recall.gguf"), "--text", str(text), "--text-tokens", "640", "--seed", "2"]
    assert recall.run(parser.parse_args(args)) == 0
    haystack = make_haystack(640, seed=2)
    assert text.read_text() == haystack.text
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [[needle.question.strip() + "?", needle.answer.strip()] for needle in haystack.needles]


def test_model_and_text_are_two_files(tmp_path):
    parser = argparse.ArgumentParser()
    recall.add_arguments(parser)
    file = str(tmp_path / "recall.gguf")
    with pytest.raises(UsageError, match="give two files"):
        recall.run(parser.parse_args(["-o", file, "--text", file]))
    assert list(tmp_path.iterdir()) == []
