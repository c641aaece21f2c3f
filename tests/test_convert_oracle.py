"""`convert` against the pinned llama.cpp's own converter and transformers: `make test-convert` brings these."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from child import run_child_json
from convert_checkpoints import CHECKPOINTS, write_checkpoint

from monarch_llamacpp import builder_source, paths, pin
from monarch_llamacpp.convert import convert

torch = pytest.importorskip("torch", reason="needs torch: make test-convert")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-convert")

PROMPT = "the cat sat on 42 mats while seven monarchs flew"

# what upstream's own fingerprint would say of the full vocabulary
PRE = {"llama3": "llama-bpe", "nemo": "tekken", "smollm": "smollm", "qwen2": "qwen2"}

# general.* says where a model comes from, but for these
GENERAL = {f"general.{key}" for key in ("architecture", "type", "file_type", "quantization_version")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    for name in CHECKPOINTS:
        write_checkpoint(folder / name, name, n_shards=3)
    return folder


def run_upstream(source: Path, output: Path, outtype: str) -> None:
    tree = builder_source.upstream_dir(pin.read_pin(), paths.cache_dir())
    # upstream's fingerprints do not know the small vocabularies of our checkpoints
    script = (
        "import sys, runpy; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; "
        "from conversion.base import TextModel; pre = sys.argv.pop(1); "
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: pre; "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    pre = PRE.get(source.name, "none")
    arguments = [tree, tree / "gguf-py", pre, tree / "convert_hf_to_gguf.py", source, "--outfile", output]
    command = [sys.executable, "-c", script, *map(str, arguments), "--outtype", outtype]
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree / "gguf-py")}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tree)
    assert result.returncode == 0, result.stderr[-3000:]


def keys(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_as_upstream_writes(sources: Path, tmp_path: Path, name: str, outtype: str) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    convert(sources / name, ours, outtype, name)
    run_upstream(sources / name, theirs, outtype)
    compare_tensors(gguf.GGUFReader(ours), gguf.GGUFReader(theirs))
    compare_keys(keys(ours), keys(theirs), name)


def compare_tensors(ours: gguf.GGUFReader, theirs: gguf.GGUFReader) -> None:
    got, want = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert set(got) == set(want)
    for key, tensor in want.items():
        assert got[key].tensor_type == tensor.tensor_type, key
        assert list(got[key].shape) == list(tensor.shape), key
        if key == "rope_freqs.weight":  # upstream computes these few in f32
            np.testing.assert_allclose(got[key].data, tensor.data, rtol=1e-6)
        else:
            assert np.array_equal(got[key].data, tensor.data), key


def compare_keys(got: dict[str, object], want: dict[str, object], name: str) -> None:
    want = {key: value for key, value in want.items() if key in GENERAL or not key.startswith("general.")}
    assert got.pop("general.name") == name
    if name == "linear":  # upstream has no scores for a tokenizer.json and pads nothing, which llama.cpp needs
        assert set(want.pop("tokenizer.ggml.scores")) == {-1000.0} and got.pop("tokenizer.ggml.scores")
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            got[key] = got[key][: len(want[key])]
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key] == value, key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_output_is_that_of_transformers(stock_bin: Path, sources: Path, tmp_path: Path, name: str) -> None:
    convert(sources / name, tmp_path / "out.gguf", "f32", name)
    report = run_child_json(stock_bin, "child_convert.py", [tmp_path / "out.gguf", PROMPT])
    model = transformers.AutoModelForCausalLM.from_pretrained(sources / name, torch_dtype=torch.float32)
    tokens = torch.tensor([report["tokens"]])
    out = model.generate(tokens, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[0, tokens.shape[1] :].tolist() == report["greedy"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tokens_are_those_of_transformers(stock_bin: Path, sources: Path, tmp_path: Path, name: str) -> None:
    convert(sources / name, tmp_path / "out.gguf", "f16", name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources / name)
    for text in (PROMPT, "mat's 12345 CATS!\n\n  the  end", "über 東京 🦋"):
        report = run_child_json(stock_bin, "child_convert.py", [tmp_path / "out.gguf", text])
        assert report["tokens"] == tokenizer.encode(text, add_special_tokens=False), text
