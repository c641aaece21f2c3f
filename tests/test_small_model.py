"""The small model that ships: what its file says, what it recalls, and whether its training can be trusted."""

import argparse
import random
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from child import run_child_json

from monarch_llamacpp.recall_text import make_haystack

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from small_model import needles, novels, tasks, tokenizer  # noqa: E402
from small_model.data import ANSWER_WEIGHT, Conversation, Corpus, Mixture, draw_batch, fact_sequence  # noqa: E402

MODEL = ROOT / "models" / "monarch-small.gguf"
MOST_BYTES = 24_000_000
HOT_WINDOW = 256
N_VOCAB = 512


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(MODEL)


def field(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents()


def test_the_file_is_small_and_of_the_stated_shape(reader):
    assert MODEL.stat().st_size <= MOST_BYTES
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "llama.attention.key_length") == field(reader, "llama.attention.value_length") == 64
    assert field(reader, "llama.attention.head_count") > field(reader, "llama.attention.head_count_kv")
    assert field(reader, "llama.context_length") >= 4096
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1} == {"Q8_0"}


def test_its_vocabulary_writes_anything_and_every_digit_alone(reader):
    pieces = field(reader, "tokenizer.ggml.tokens")
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    assert {needles.USER, needles.ASSISTANT} <= set(pieces)
    assert [piece for piece in pieces if sum(char.isdigit() for char in piece) > 1 and piece[:3] != "<0x"] == []


def test_its_template_is_what_the_tasks_are_written_in(reader):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(field(reader, "tokenizer.chat_template"))
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Who are you?"},
    ]
    text = template.render(messages=messages, eos_token="</s>", add_generation_prompt=True)
    said = "<|user|>\nHello.</s>\n<|assistant|>\nGood day.</s>\n<|user|>\nWho are you?</s>\n<|assistant|>\n"
    assert text == said


def ask(lib_dir: Path, n_tokens: int, depths: str, n_facts: int = 1, **env: str) -> dict:
    args = [MODEL, "--tokens", n_tokens, "--depths", depths, "--facts", n_facts]
    return run_child_json(lib_dir, "child_small_model.py", args, env=env)


@pytest.mark.parametrize(("n_facts", "most_wrong"), [(1, 2), (8, 5)])
def test_upstream_recalls(stock_bin, n_facts, most_wrong):
    report = ask(stock_bin, 1024, ",".join(str(i / 19) for i in range(20)), n_facts)
    wrong = [each for each in report["asked"] if not each["right"]]
    assert len(wrong) <= most_wrong, wrong  # models/README.md: 98 and 92 % are right


def test_exact_and_paged_answer_as_upstream_does_where_window_cannot(stock_bin, patched_bin):
    """paged: an eighth of the tokens, no dense layers."""
    depths = "0.1,0.2,0.3,0.4,0.5,0.6"
    stock = ask(stock_bin, 2048, depths)
    exact = ask(patched_bin, 2048, depths, MONARCH_MODE="exact", MONARCH_HOT_WINDOW=str(HOT_WINDOW))
    window = ask(patched_bin, 2048, depths, MONARCH_MODE="window", MONARCH_HOT_WINDOW=str(HOT_WINDOW))
    budget = {"MONARCH_HOT_WINDOW": "128", "MONARCH_PROMOTE_TOKENS": "112", "MONARCH_DENSE_LAYERS": "0"}
    paged = ask(patched_bin, 2048, depths, MONARCH_MODE="paged", **budget)
    assert sum(each["right"] for each in stock["asked"]) >= 5
    assert [each["answer"] for each in exact["asked"]] == [each["answer"] for each in stock["asked"]]
    assert [each for each in window["asked"] if each["right"]] == []
    assert sum(each["right"] for each in paged["asked"]) >= sum(each["right"] for each in stock["asked"]) - 1


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up novels."""
    folder = tmp_path_factory.mktemp("novels")
    for i in range(12):
        text = make_haystack(3000, 1, seed=i).text.replace(". ", ".\n").replace("\n\n", "\n\n ")
        (folder / f"novel-{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(texts: Path) -> Corpus:
    train, _ = novels.split_novels(novels.read_novels(texts))
    return Corpus(train, tokenizer.load(tokenizer.train(train, N_VOCAB, 1)))


def test_an_archive_reads_as_its_folder_and_a_novel_is_kept_out(texts, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "novels.tar.xz", "w:xz") as archive:
        archive.add(texts, "nov")
    read = novels.read_novels(tmp_path / "novels.tar.xz")
    assert read == novels.read_novels(texts) and len(read) == 12
    train, kept_out = novels.split_novels(read)
    assert len(train) == 11 and kept_out == [read["novel-10.txt"]]


def test_facts_do_not_contradict_each_other():
    facts = tasks.make_facts(300, random.Random(1), tasks.MORE_RELATIONS)
    assert len({(fact.name, fact.relation) for fact in facts}) == 300
    for fact in facts:
        assert fact.value in fact.statement and fact.value in fact.answer
        assert fact.name in fact.statement and fact.name in fact.question(random.Random(2))


def test_names_and_values_are_drawn_fresh():
    drawn = [tasks.make_facts(1, random.Random(i), tasks.MORE_RELATIONS)[0] for i in range(500)]
    assert len({(fact.name, fact.value) for fact in drawn}) > 490


@pytest.mark.parametrize("varied", [False, True])
def test_what_is_asked_was_said_before(corpus, varied):
    """An answer's tokens weigh most, and its value stands in the text before the question."""
    sequence = fact_sequence(corpus, 700, random.Random(3), varied)
    end = sequence.tokens.index(tokenizer.EOS)
    said = corpus.vocab.decode(sequence.tokens[:end])
    answers = answered(corpus, sequence.tokens, sequence.weights)
    assert answers and all(answer.rstrip(".").split()[-1] in said for answer in answers)


def test_conversations_ask_for_what_the_user_told(corpus):
    sequence = Conversation(corpus, 900, random.Random(4)).write()
    text = corpus.vocab.decode(sequence.tokens)
    assert text.startswith(needles.USER) and needles.ASSISTANT in text
    assert len(sequence.tokens) == len(sequence.weights) >= 900


def answered(corpus: Corpus, tokens: list[int], weights: list[float]) -> list[str]:
    runs, run = [], []
    for token, weight in zip(tokens, weights, strict=True):
        if weight == ANSWER_WEIGHT and token != tokenizer.EOS:
            run.append(token)
        elif run:
            runs, run = [*runs, corpus.vocab.decode(run)], []
    return runs


def test_a_batch_follows_from_seed_and_step_alone(corpus):
    mixture = Mixture(0.2, 0.2, 0.2, chats=0.2, varied=True)
    first = draw_batch(corpus, mixture, 6, 300, 1, 5)
    draw_batch(corpus, mixture, 6, 300, 1, 6)
    again, other = draw_batch(corpus, mixture, 6, 300, 1, 5), draw_batch(corpus, mixture, 6, 300, 1, 6)
    assert first[0].shape == (6, 301) and first[1].shape == (6, 300)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.fixture
def train_script():
    torch = pytest.importorskip("torch", reason="training needs torch: pip install -e '.[train]'")
    torch.set_num_threads(1)
    import train_small_model

    return train_small_model


def make_run(script, texts: Path, work: Path):
    args = argparse.Namespace(novels=texts, work=work, preset="tiny", steps=6, compile=False)
    return script.Run(args)


def test_a_resumed_run_ends_as_an_uninterrupted_one(train_script, texts, tmp_path):
    import torch

    whole = make_run(train_script, texts, tmp_path / "whole")
    for _ in range(6):
        whole.train_step()
    begun = make_run(train_script, texts, tmp_path / "parts")
    for _ in range(3):
        begun.train_step()
    begun.save()
    resumed = make_run(train_script, texts, tmp_path / "parts")
    resumed.resume()
    assert resumed.step == 3
    for _ in range(3):
        resumed.train_step()
    for (name, one), other in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_upstream_computes_what_was_trained(train_script, texts, stock_bin, tmp_path):
    """Tokens and logits of an exported network: the layout, the pairs that turn and those that do not."""
    import torch
    from logits import run_cases

    run = make_run(train_script, texts, tmp_path / "run")
    model = tmp_path / "tiny.gguf"
    run.export(model)
    text = tmp_path / "text.txt"
    text.write_text("The king said: “naïve” 1234!\nIt was 5 o'clock.  Yes.", encoding="utf-8")
    read = run_child_json(stock_bin, "child_tokens.py", [model, text, 1000])
    assert read["tokens"] == run.vocab.encode(text.read_text(encoding="utf-8"))
    tokens = [read["bos"], *(np.arange(200) * 37 % N_VOCAB).tolist()]
    case = {"model": str(model), "n_ctx": 256, "n_ubatch": 256, "steps": [["decode", len(tokens)]], "tokens": tokens}
    got = run_cases(stock_bin, tmp_path, [case])[0].logits
    with torch.no_grad():
        expected = run.net(torch.tensor([tokens]))[0].numpy()
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.999
