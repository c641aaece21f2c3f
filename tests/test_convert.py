"""`convert`: it writes what was in the checkpoint, the stock library loads it, and nothing hostile gets through."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from child import run_child_json
from convert_checkpoints import CHECKPOINTS, TINYLLAMA, WHOLE, make_tensors, write_checkpoint, write_json, write_weights

from monarch_llamacpp.cli import main
from monarch_llamacpp.convert import convert
from monarch_llamacpp.errors import MonarchError

ROUNDING = {"F32": 0.0, "F16": 2.0**-10, "BF16": 2.0**-7}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in CHECKPOINTS:
        write_checkpoint(folder / name, name)
    return folder


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as f32, by name."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def turned(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Row r of a head's first half and row r of its second half side by side, written out."""
    half = len(weight) // n_head // 2
    rows = [head * 2 * half + part * half + r for head in range(n_head) for r in range(half) for part in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype, n_shards", [("BF16", 3), ("F16", 1), ("F32", 2)])
def test_every_tensor_arrives(tmp_path: Path, name: str, dtype: str, n_shards: int) -> None:
    config, _ = CHECKPOINTS[name]
    tensors = write_checkpoint(tmp_path / "src", name, dtype=dtype, n_shards=n_shards)
    convert(tmp_path / "src", tmp_path / "out.gguf", "f32", "x")
    got = read(tmp_path / "out.gguf")
    want = {"token_embd.weight": tensors["model.embed_tokens.weight"]}
    want["output_norm.weight"] = tensors["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        want["output.weight"] = tensors["lm_head.weight"]
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    n_head = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for i in range(config["num_hidden_layers"]):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                source = tensors.get(f"model.layers.{i}.{theirs}.{kind}")
                if source is not None:
                    turn = config["model_type"] != "qwen2" and ours in n_head
                    want[f"blk.{i}.{ours}.{kind}"] = turned(source, n_head[ours]) if turn else source
    extra = {"rope_freqs.weight"} if name == "llama3" else set()
    assert set(got) == set(want) | extra
    for key, values in want.items():
        assert got[key].shape == values.shape
        np.testing.assert_allclose(got[key], values, rtol=ROUNDING[dtype], atol=1e-6 if dtype != "F32" else 0)


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "f32"])
def test_types_of_the_output(checkpoints: Path, tmp_path: Path, outtype: str) -> None:
    convert(checkpoints / "tinyllama", tmp_path / "out.gguf", outtype, "x")
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        is_vector = len(tensor.shape) == 1
        assert tensor.tensor_type.name.lower() == ("f32" if is_vector else outtype), tensor.name
    exact, got = read_f32(checkpoints / "tinyllama", tmp_path), read(tmp_path / "out.gguf")
    error = {"f16": 1e-7, "bf16": 0.0, "q8_0": 1e-4, "f32": 0.0}[outtype]  # the source is bf16
    for key, values in exact.items():
        assert np.square(got[key] - values).mean() <= error * np.square(values).mean(), key


def read_f32(source: Path, folder: Path) -> dict[str, np.ndarray]:
    convert(source, folder / "exact.gguf", "f32", "x")
    return read(folder / "exact.gguf")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stock_library_loads_and_decodes(stock_bin: Path, checkpoints: Path, tmp_path: Path, name: str) -> None:
    convert(checkpoints / name, tmp_path / "out.gguf", "f16", "x")
    report = run_child_json(stock_bin, "child_convert.py", [tmp_path / "out.gguf", "the cat sat on 42 mats"])
    assert report["text"] == "the cat sat on 42 mats"
    assert len(report["greedy"]) == 16 and report["n_vocab"] == CHECKPOINTS[name][0]["vocab_size"]


def test_tokens_and_keys_of_a_sentencepiece_model(checkpoints: Path, tmp_path: Path) -> None:
    import sentencepiece

    convert(checkpoints / "tinyllama", tmp_path / "out.gguf", "f16", "Tiny")
    got = fields(tmp_path / "out.gguf")
    pieces = sentencepiece.SentencePieceProcessor(str(checkpoints / "tinyllama" / "tokenizer.model"))
    n = pieces.vocab_size()
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert tokens[3:n] == [pieces.id_to_piece(i) for i in range(3, n)]
    assert np.allclose(got["tokenizer.ggml.scores"][3:n], [pieces.get_score(i) for i in range(3, n)])
    assert (tokens[300], types[300]) == ("<extra>", gguf.TokenType.USER_DEFINED)
    assert (tokens[319], types[319]) == ("[PAD319]", gguf.TokenType.UNUSED)
    assert types[3:259] == [gguf.TokenType.BYTE] * 256
    assert got["general.name"] == "Tiny" and got["general.architecture"] == "llama"
    assert got["llama.rope.dimension_count"] == 32 and got["llama.attention.head_count_kv"] == 2
    assert "<|' + message['role']" in got["tokenizer.chat_template"]


def test_vocabulary_of_tokenizer_json_with_byte_fallback(checkpoints: Path, tmp_path: Path) -> None:
    """A SentencePiece BPE that only tokenizer.json holds: the same tokens, in the same order of preference."""
    convert(checkpoints / "linear", tmp_path / "out.gguf", "f16", "x")
    convert(checkpoints / "tinyllama", tmp_path / "spm.gguf", "f16", "x")
    got, want = fields(tmp_path / "out.gguf"), fields(tmp_path / "spm.gguf")
    for key in ("tokens", "token_type", "bos_token_id", "eos_token_id", "add_bos_token", "add_sep_token"):
        assert got[f"tokenizer.ggml.{key}"] == want[f"tokenizer.ggml.{key}"], key
    assert got["tokenizer.chat_template"] == want["tokenizer.chat_template"]
    merged = [i for i in range(259, 300) if len(got["tokenizer.ggml.tokens"][i]) > 1]
    scores, theirs = (np.array(x["tokenizer.ggml.scores"])[merged] for x in (got, want))
    assert len(merged) > 10 and list(np.argsort(scores)) == list(np.argsort(theirs))


@pytest.mark.parametrize(
    "name, pre, adds_bos", [("llama3", "llama-bpe", True), ("nemo", "tekken", True), ("smollm", "smollm", False),
                            ("qwen2", "qwen2", False)]
)  # fmt: skip
def test_vocabulary_of_a_bpe(checkpoints: Path, tmp_path: Path, name: str, pre: str, adds_bos: bool) -> None:
    convert(checkpoints / name, tmp_path / "out.gguf", "f16", "x")
    got = fields(tmp_path / "out.gguf")
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert (got["tokenizer.ggml.model"], got["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert got["tokenizer.ggml.merges"][:2] == ["t h", "th e"] and len(got["tokenizer.ggml.merges"]) == 8
    assert types[266:270] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.USER_DEFINED]
    assert tokens[264:266] == WHOLE and tokens[270] == "[PAD270]" and types[270] == gguf.TokenType.UNUSED
    assert got["tokenizer.ggml.add_bos_token"] == adds_bos
    assert "tokenizer.ggml.scores" not in got


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """60 MiB of weights more take no more memory."""
    peaks = []
    for n_layer in (1, 16):
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": n_layer}
        write_checkpoint(tmp_path / str(n_layer), "tinyllama", n_shards=1, **sizes)
        code = (
            "import re; from pathlib import Path; from monarch_llamacpp.convert import convert; "
            f"convert(Path({str(tmp_path / str(n_layer))!r}), Path({str(tmp_path / 'out.gguf')!r}), 'q8_0', 'x'); "
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    assert peaks[1] - peaks[0] < 20 * 1024, peaks


#
# what must not get through
#


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        write_json(folder / name, change(value) or value)

    return edit


def set_config(**values: object) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config | values)


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        text = json.dumps(change(header) or header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def set_tensor(**values: object) -> Callable[[Path], None]:
    return edit_header(lambda header: header["model.norm.weight"].update(values))


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def replace_by_pipe(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() or os.mkfifo(folder / name)


def replace_by_link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() or (folder / name).symlink_to(target)


def overlap(folder: Path) -> None:
    """Two tensors of one size share their bytes."""

    def change(header: dict) -> None:
        header["model.norm.weight"] = header["model.layers.0.input_layernorm.weight"]

    edit_header(change)(folder)


def infinite_weight(folder: Path) -> None:
    tensors = make_tensors(TINYLLAMA)
    tensors["lm_head.weight"][3, 5] = 1e6
    write_weights(folder, tensors, "F32", 1)


def drop_tensor(folder: Path) -> None:
    tensors = make_tensors(TINYLLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_weights(folder, tensors, "F16", 1)


def add_tensor(folder: Path) -> None:
    more = {"model.layers.7.mlp.up_proj.weight": np.ones((2, 2), np.float32)}
    write_weights(folder, make_tensors(TINYLLAMA) | more, "F16", 1)


def point_index_outside(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../../secret.safetensors"}})


def write_index(value: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "model.safetensors.index.json", value)


BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config no object": (write("config.json", b"[1]"), "holds no JSON object"),
    "config no JSON": (write("config.json", b"{"), "not valid JSON"),
    "config nested too deep": (write("config.json", b'{"a":' + b"[" * 200000), "not valid JSON"),
    "other architecture": (set_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported"),
    "no architecture": (set_config(architectures=None), "None is not supported"),
    "activation": (set_config(hidden_act="gelu"), "gelu"),
    "quantised": (set_config(quantization_config={"bits": 4}), "quantised"),
    "architecture no text": (set_config(architectures=[["LlamaForCausalLM"]]), "is not supported"),
    "too many layers": (set_config(num_hidden_layers=2**24), "num_hidden_layers is 16777216"),
    "number beyond all": (set_config(rope_theta=10**400), "rope_theta"),
    "negative layers": (set_config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "huge vocabulary": (set_config(vocab_size=2**40), "vocab_size"),
    "sizes as text": (set_config(hidden_size="128"), "hidden_size is '128'"),
    "heads that do not divide": (set_config(num_key_value_heads=3), "KV heads"),
    "epsilon": (set_config(rms_norm_eps=0), "rms_norm_eps"),
    "rope scaling": (set_config(rope_scaling={"rope_type": "longrope"}), "longrope"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
    "empty weights": (truncate("model.safetensors", 0), "too short"),
    "cut in the header": (truncate("model.safetensors", 100), "the header claims"),
    "cut in the data": (truncate("model.safetensors", 400000), "beyond the file's end"),
    "header size that wraps": (write("model.safetensors", b"\xff" * 64), "the header claims"),
    "header no JSON": (write("model.safetensors", b"\x02" + b"\0" * 7 + b"{]"), "not valid JSON"),
    "header no object": (write("model.safetensors", b"\x02" + b"\0" * 7 + b"[]"), "no JSON object"),
    "type": (set_tensor(dtype="I64"), "'I64'"),
    "type no text": (set_tensor(dtype=["F16"]), "the type ['F16']"),
    "shape that wraps": (set_tensor(shape=[2**32, 2**32]), "not what"),
    "shape of zero": (set_tensor(shape=[0]), "the shape"),
    "shape of three": (set_tensor(shape=[2, 2, 32]), "the shape"),
    "offsets backwards": (set_tensor(data_offsets=[100, 0]), "beyond"),
    "offsets negative": (set_tensor(data_offsets=[-256, 0]), "the offsets"),
    "offsets past the end": (set_tensor(data_offsets=[2**60, 2**60 + 256]), "beyond"),
    "overlap": (overlap, "overlap"),
    "weights a pipe": (replace_by_pipe("model.safetensors"), "not an ordinary file"),
    "weights a device": (replace_by_link("model.safetensors", "/dev/zero"), "not an ordinary file"),
    "weights a folder": (replace_by_link("model.safetensors", "/tmp"), "not an ordinary file"),
    "config a pipe": (replace_by_pipe("config.json"), "not an ordinary file"),
    "tokenizer a device": (replace_by_link("tokenizer.model", "/dev/zero"), "not an ordinary file"),
    "link to nothing": (replace_by_link("model.safetensors", "nowhere"), "is missing"),
    "beyond f16": (infinite_weight, "f16 cannot"),
    "offsets of another size": (set_tensor(data_offsets=[0, 4]), "not what"),
    "tensor no object": (edit_header(lambda header: header | {"model.norm.weight": 3}), "the type None"),
    "other shape": (set_config(intermediate_size=256), "config.json says"),
    "tensor absent": (drop_tensor, "lacks blk.1.ffn_up.weight"),
    "tensor too many": (add_tensor, "model.layers.7.mlp.up_proj.weight"),
    "index outside": (point_index_outside, "not a safetensors file of this folder"),
    "index empty": (write_index({"weight_map": {}}), "no weight_map"),
    "index no weight_map": (write_index({}), "no weight_map"),
    "index no text": (write_index({"weight_map": {"lm_head.weight": 3}}), "names 3 as a shard"),
    "index names absent shard": (write_index({"weight_map": {"lm_head.weight": "m.safetensors"}}), "is missing"),
    "index promises more": (write_index({"weight_map": {"nothing": "model.safetensors"}}), "lacks the tensor nothing"),
    "no tokenizer": (drop("tokenizer.model", "tokenizer.json"), "neither tokenizer.model nor"),
    "tokenizer damaged": (write("tokenizer.model", b"\xff" * 100), "not a SentencePiece model"),
    "tokenizer cut": (truncate("tokenizer.model", 1000), "not a SentencePiece model"),
    "tokenizer empty": (write("tokenizer.model", b""), "holds no pieces"),
    "piece longer than the file": (write("tokenizer.model", b"\x0a\xff\xff\xff\x7f"), "not a SentencePiece model"),
    "piece whose size wraps": (write("tokenizer.model", b"\x0a" + b"\xff" * 9 + b"\x7f"), "not a SentencePiece model"),
    "piece without a text": (write("tokenizer.model", b"\x0a\x02\x18\x01"), "not a SentencePiece model"),
    "piece of no type": (write("tokenizer.model", b"\x0a\x05\x0a\x01a\x18\x09"), "not a SentencePiece model"),
    "piece whose score is no number": (write("tokenizer.model", b"\x0a\x05\x15\0\0\xc0\x7f"), "not a SentencePiece"),
    "added tokens damaged": (write("added_tokens.json", b'{"x": "y"}'), "not as expected"),
    "added token negative": (write("added_tokens.json", b'{"x": -1}'), "has the id -1"),
    "special token negative": (set_config(bos_token_id=-5, eos_token_id=-5), "has the id -5"),
    "template no text": (edit_json("tokenizer_config.json", lambda x: x | {"chat_template": 5}), "not as expected"),
    "template false": (edit_json("tokenizer_config.json", lambda x: x | {"chat_template": False}), "not as expected"),
    "template a surrogate": (edit_json("tokenizer_config.json", lambda x: x | {"chat_template": "\ud800"}), "not as"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "src"
    write_checkpoint(folder, "tinyllama", dtype="F16", n_shards=1)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    good: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD[case]
    folder, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(good, folder)
    out.mkdir()
    damage(folder)
    assert main(["convert", str(folder), "-o", str(out / "x.gguf")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("value", [1e7, np.inf, np.nan])
def test_a_block_that_q8_0_cannot_scale_is_refused(good: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(good, tmp_path / "src")
    tensors = make_tensors(TINYLLAMA)
    tensors["lm_head.weight"][3, 5] = value
    write_weights(tmp_path / "src", tensors, "F32", 1)
    with pytest.raises(MonarchError, match="lm_head.weight holds values that q8_0 cannot"):
        convert(tmp_path / "src", tmp_path / "out.gguf", "q8_0", "x")
    assert not (tmp_path / "out.gguf").exists()


def edit_tokenizer(*path: str | int, **values: object) -> Callable[[dict], object]:
    def edit(tokenizer: dict) -> None:
        for key in path:
            tokenizer = tokenizer[key]
        tokenizer.update(values)

    return edit


def test_words_that_are_tokens_are_split_unless_the_tokenizer_says_so(checkpoints: Path, tmp_path: Path) -> None:
    """Llama 3's cut without ignore_merges has another name in llama.cpp."""
    shutil.copytree(checkpoints / "llama3", tmp_path / "src")
    edit_json("tokenizer.json", edit_tokenizer("model", ignore_merges=False))(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out.gguf", "f16", "x")
    assert fields(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == "smaug-bpe"


BAD_BPE = {
    "cuts otherwise": (edit_tokenizer("pre_tokenizer", "pretokenizers", 0, pattern={"Regex": r"\w+"}), r"\\w+"),
    "cuts twice": (edit_tokenizer("pre_tokenizer", "pretokenizers", 1, use_regex=True), "is not supported"),
    "adds a space": (edit_tokenizer("pre_tokenizer", "pretokenizers", 1, add_prefix_space=True), "is not supported"),
    "cuts nothing": (edit_tokenizer(pre_tokenizer=None), "is not supported"),
    "takes whole words": (edit_tokenizer("model", ignore_merges=True), "is not supported"),
    "lower case": (edit_tokenizer(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    "unigram": (edit_tokenizer("model", type="Unigram"), "a Unigram tokenizer"),
    "merge of three": (edit_tokenizer("model", merges=["a b c"]), "not of two parts"),
    "merges no list": (edit_tokenizer("model", merges=7), "not as expected"),
    "token beyond the embedding": (edit_tokenizer("model", vocab={"a": 320}), "has the id 320"),
    "token negative": (edit_tokenizer("model", vocab={"a": -1}), "has the id -1"),
    "token no number": (edit_tokenizer("model", vocab={"a": "b"}), "has the id 'b'"),
    "no model": (lambda tokenizer: tokenizer.pop("model") and None, "not as expected"),
    "added token no object": (edit_tokenizer(added_tokens=["x"]), "not as expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BPE)
def test_bad_tokenizer_json_is_refused_by_name(checkpoints: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD_BPE[case]
    shutil.copytree(checkpoints / "qwen2", tmp_path / "src")
    edit_json("tokenizer.json", change)(tmp_path / "src")
    with pytest.raises(MonarchError, match=re.escape(message)):
        convert(tmp_path / "src", tmp_path / "out.gguf", "f16", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("target, message", [("missing/x.gguf", "does not exist"), (".", "is a folder")])
def test_bad_output_is_refused_before_work(
    good: Path, tmp_path: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(good), "-o", str(tmp_path / target)]) == 2
    assert message in capsys.readouterr().err


def test_an_existing_output_survives_a_failure(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"GGUF before")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100000, {hard})); "
        f"from monarch_llamacpp.cli import main; sys.exit(main(['convert', {str(good)!r}, '-o', {str(out)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert re.match(r"error: .*(too large|disk may be full); no output was left", result.stderr)
    assert out.read_bytes() == b"GGUF before" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("stage", ["write_tensor_data", "write_ti_data_to_file", "close"])
def test_an_interrupt_leaves_nothing(good: Path, tmp_path: Path, monkeypatch, capsys, stage: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, stage, interrupt)
    assert main(["convert", str(good), "-o", str(tmp_path / "x.gguf")]) == 130
    assert capsys.readouterr().err.strip() == "interrupted" and list(tmp_path.iterdir()) == []


def test_an_end_from_outside_leaves_nothing(good: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main(["convert", str(good), "-o", str(tmp_path / "x.gguf")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []


def test_only_a_gguf_is_replaced(good: Path, tmp_path: Path, capsys) -> None:
    weights = tmp_path / "model.safetensors"
    shutil.copy(good / "model.safetensors", weights)
    before = weights.read_bytes()
    for target, why in ((weights, "exists and is no GGUF"), ("/dev/null", "is a device or a pipe")):
        assert main(["convert", str(good), "-o", str(target)]) == 2
        assert why in capsys.readouterr().err
    assert weights.read_bytes() == before and Path("/dev/null").is_char_device()
    (tmp_path / "x.gguf").write_bytes(b"GGUF before")
    assert main(["convert", str(good), "-o", str(tmp_path / "x.gguf")]) == 0
    assert fields(tmp_path / "x.gguf")["general.architecture"] == "llama"


def test_the_last_line_names_the_output_and_its_size(good: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(good), "-o", str(tmp_path / "x.gguf"), "--outtype", "q8_0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r".*/x\.gguf: \d+\.\d MiB, q8_0", captured.err.splitlines()[-1])


@pytest.mark.parametrize("source, message", [("no/such/folder", "neither a folder"), (__file__, "is a file")])
def test_a_source_that_is_nothing(source: str, message: str, tmp_path: Path, capsys) -> None:
    assert main(["convert", source, "-o", str(tmp_path / "x.gguf")]) == 2
    assert message in capsys.readouterr().err


def test_repo_id_is_fetched_through_the_hub(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.append((repo, kw)) or str(good))
    assert main(["convert", "some/model", "-o", str(tmp_path / "x.gguf")]) == 0
    (repo, patterns), = asked
    assert repo == "some/model"
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "pytorch_model.bin", "README.md",
             "consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "model.gguf"]  # fmt: skip
    assert list(huggingface_hub.utils.filter_repo_objects(names, **patterns)) == names[:7]
    assert fields(tmp_path / "x.gguf")["general.name"] == "model"


@pytest.mark.parametrize("failure, message", [("LocalEntryNotFoundError", "cannot be reached"), ("OSError", "resume")])
def test_a_failed_fetch_says_so(tmp_path: Path, monkeypatch, capsys, failure: str, message: str) -> None:
    import huggingface_hub
    import huggingface_hub.errors

    def fail(repo: str, **_: object) -> str:
        raise getattr(huggingface_hub.errors, failure, OSError)("connection lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert main(["convert", "some/model", "-o", str(tmp_path / "x.gguf")]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_default_is_tinyllama(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(good))
    assert main(["convert", "-o", str(tmp_path / "x.gguf")]) == 0
    assert asked == ["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]


def test_head_sizes(tmp_path: Path) -> None:
    """A head size given in config.json need not be hidden_size / heads."""
    tensors = write_checkpoint(tmp_path / "src", "mistral")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (256, 128)
    convert(tmp_path / "src", tmp_path / "out.gguf", "f16", "x")
    assert fields(tmp_path / "out.gguf")["llama.attention.key_length"] == 64


def test_rope_scaling_keys(checkpoints: Path, tmp_path: Path) -> None:
    convert(checkpoints / "linear", tmp_path / "linear.gguf", "f16", "x")
    convert(checkpoints / "qwen2", tmp_path / "yarn.gguf", "f16", "x")
    linear, yarn = fields(tmp_path / "linear.gguf"), fields(tmp_path / "yarn.gguf")
    assert (linear["llama.rope.scaling.type"], linear["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert (yarn["qwen2.rope.scaling.type"], yarn["qwen2.rope.scaling.factor"]) == ("yarn", 4.0)
    assert yarn["qwen2.rope.scaling.original_context_length"] == 512
    assert yarn["qwen2.rope.scaling.yarn_beta_fast"] == 32.0


def test_rope_factors_of_llama3(checkpoints: Path, tmp_path: Path) -> None:
    """Fast pairs as they are, slow ones slower by the factor, a ramp between."""
    convert(checkpoints / "llama3", tmp_path / "out.gguf", "f16", "x")
    factors = read(tmp_path / "out.gguf")["rope_freqs.weight"]
    turns = 512 / (2 * np.pi * 500000.0 ** (np.arange(16) / 16))
    assert np.all(factors[turns >= 4] == 1) and np.allclose(factors[turns <= 1], 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and np.all((factors[between] > 1) & (factors[between] < 8))
