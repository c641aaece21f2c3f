"""Small Hugging Face checkpoints in the file formats of the real ones: config, tokenizer, sharded safetensors."""

import io
import json
import random
from pathlib import Path

import numpy as np

TEMPLATE = (
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n{% endfor %}"
)

LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_CUT = LLAMA3_CUT.replace("{1,3}", "")

BASE = {
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 320, "initializer_range": 0.02,
}  # fmt: skip

TINYLLAMA = BASE | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "rope_scaling": None, "torch_dtype": "bfloat16", "pretraining_tp": 1,
}  # fmt: skip
MISTRAL = TINYLLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 64}
LLAMA3 = TINYLLAMA | {
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip
QWEN2 = BASE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 0, "eos_token_id": 0}


def n_values(config: dict) -> tuple[int, int]:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    n_embd, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_q, n_kv = n_values(config)
    res = {"model.embed_tokens.weight": (n_vocab, n_embd), "model.norm.weight": (n_embd,)}
    if not config["tie_word_embeddings"]:
        res["lm_head.weight"] = (n_vocab, n_embd)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        res |= {
            f"{at}input_layernorm.weight": (n_embd,), f"{at}post_attention_layernorm.weight": (n_embd,),
            f"{at}self_attn.q_proj.weight": (n_q, n_embd), f"{at}self_attn.k_proj.weight": (n_kv, n_embd),
            f"{at}self_attn.v_proj.weight": (n_kv, n_embd), f"{at}self_attn.o_proj.weight": (n_embd, n_q),
            f"{at}mlp.gate_proj.weight": (n_ff, n_embd), f"{at}mlp.up_proj.weight": (n_ff, n_embd),
            f"{at}mlp.down_proj.weight": (n_embd, n_ff),
        }  # fmt: skip
        if config["model_type"] == "qwen2":
            res |= {f"{at}self_attn.{x}_proj.bias": (n,) for x, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
    return res


def make_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    res = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape) * (0.5 if "embed" in name or len(shape) == 1 else 2 * shape[-1] ** -0.5)
        res[name] = (values + ("norm" in name)).astype(np.float32)
    return res


def encode_values(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        data = encode_values(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, n_shards: int) -> None:
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        names = list(tensors)[i::n_shards]
        write_safetensors(folder / shard, {name: tensors[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(t.size for t in tensors.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def sentences(n: int = 400) -> list[str]:
    rng = random.Random(7)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "monarchs", "flew", "south", "over", "hills"]
    return [" ".join(rng.choice(words) for _ in range(12)) + "." for _ in range(n)]


def write_sentencepiece(folder: Path, n_vocab: int) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, vocab_size=n_vocab, model_type="bpe",
        byte_fallback=True, split_digits=True, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(["<unk>", "<s>", "</s>"])}
    added |= {str(n_vocab): {"content": "<|extra|>", "special": False, "normalized": False}}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>",
            "chat_template": TEMPLATE, "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
            "tokenizer_class": "LlamaTokenizer", "model_max_length": 2048,
        },
    )  # fmt: skip


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)}
    return [others.get(b, chr(b)) for b in range(256)]


def write_bpe(folder: Path, cut: str, specials: list[str]) -> None:
    """256 bytes, a few merges, special tokens."""
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("a", "t"), ("c", "at"), ("Ġ", "cat"), ("m", "on")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    added = [
        {"id": len(vocab) + i, "content": text, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i, text in enumerate(specials)
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges],
    }  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": level, "model": model,
        },
    )  # fmt: skip
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
    write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "bos_token": specials[0], "eos_token": specials[-1],
         "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"},
    )  # fmt: skip


def write_checkpoint(folder: Path, config: dict, *, dtype: str = "BF16", n_shards: int = 2) -> dict[str, np.ndarray]:
    """Writes all of it and returns the weights, as f32 before they are rounded to dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tensors = make_tensors(config)
    write_weights(folder, tensors, dtype, n_shards)
    if config["model_type"] == "qwen2":
        write_bpe(folder, QWEN2_CUT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    elif config.get("rope_scaling"):
        write_bpe(folder, LLAMA3_CUT, ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"])
    else:
        write_sentencepiece(folder, 300)
    return tensors


CONFIGS = {"tinyllama": TINYLLAMA, "mistral": MISTRAL, "llama3": LLAMA3, "qwen2": QWEN2}
