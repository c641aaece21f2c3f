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
TEKKEN_CUT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

BASE = {
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 320, "initializer_range": 0.02,
}  # fmt: skip

TINYLLAMA = BASE | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "rope_scaling": None, "torch_dtype": "bfloat16", "pretraining_tp": 1,
}  # fmt: skip
MISTRAL = TINYLLAMA | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 64, "sliding_window": None,
}  # fmt: skip
LINEAR = TINYLLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "attention_bias": True, "mlp_bias": True}
LLAMA3 = TINYLLAMA | {
    "tie_word_embeddings": True,
    "bos_token_id": 266,
    "eos_token_id": [267, 268],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip
SMOLLM = TINYLLAMA | {"tie_word_embeddings": True, "bos_token_id": 266, "eos_token_id": 268}
QWEN2 = BASE | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 266, "eos_token_id": 268,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0},
}  # fmt: skip


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
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            res |= {f"{at}self_attn.{x}_proj.bias": (n,) for x, n in (("q", n_q), ("k", n_kv), ("v", n_kv))}
        if config.get("attention_bias"):
            res[f"{at}self_attn.o_proj.bias"] = (n_embd,)
        if config.get("mlp_bias"):
            res |= {f"{at}mlp.{x}_proj.bias": (n,) for x, n in (("gate", n_ff), ("up", n_ff), ("down", n_embd))}
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
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def sentences(n: int = 400) -> list[str]:
    rng = random.Random(7)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "monarchs", "flew", "south", "over", "hills"]
    return [" ".join(rng.choice(words) for _ in range(12)) + "." for _ in range(n)]


def train_sentencepiece(n_vocab: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, vocab_size=n_vocab, model_type="bpe",
        byte_fallback=True, split_digits=True, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_sentencepiece(folder: Path, n_vocab: int = 300) -> None:
    """TinyLlama's four files, and one added token behind its pieces."""
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(n_vocab))
    write_byte_fallback(folder, n_vocab)
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(["<unk>", "<s>", "</s>"])}
    added |= {str(n_vocab): {"content": "<extra>", "special": False, "normalized": False}}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>",
            "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": False,
            "model_max_length": 2048, "pad_token": "</s>", "padding_side": "right", "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False,
        },
    )  # fmt: skip


def write_byte_fallback(folder: Path, n_vocab: int = 300) -> None:
    """The same vocabulary as a tokenizer.json, ranks for scores; and a newer tokenizer_config.json."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(n_vocab))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    cuts = [(text[:at], text[at:]) for text in vocab for at in range(1, len(text)) if not text.startswith("<0x")]
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    merges.sort(key=lambda cut: (vocab["".join(cut)], vocab[cut[0]], vocab[cut[1]]))
    texts = enumerate(["<unk>", "<s>", "</s>"])
    added = [ADDED | {"id": i, "content": text, "special": True} for i, text in texts]
    added.append(ADDED | {"id": n_vocab, "content": "<extra>", "special": False})
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
            "pre_tokenizer": None, "post_processor": begins_with("<s>", 1),
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
            "model": MODEL | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                              "merges": [" ".join(cut) for cut in merges]},
        },
    )  # fmt: skip
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": ADDED | {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>",
         "tokenizer_class": "PreTrainedTokenizerFast"},
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
MODEL = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip


def begins_with(text: str, i: int) -> dict:
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing", "single": [first, a], "pair": [first, a, first, b],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}},
    }  # fmt: skip


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)}
    return [others.get(b, chr(b)) for b in range(256)]


def level(by_level: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_level}


def split(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, level(False)]


DIGITS = [{"type": "Digits", "individual_digits": True}, level(True)]

WHOLE = ["Ġmonarchs", "Ġbutterflies"]  # no merges lead to them


def write_bpe(
    folder: Path, steps: list[dict], specials: list[str], *, ignore_merges: bool = False, has_bos: bool = False,
    normalizer: dict | None = None, config: dict | None = None, pairs: bool = False
) -> None:  # fmt: skip
    """256 bytes, a few merges and words, special tokens of which the first begins a text and the last ends it."""
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("a", "t"), ("c", "at"), ("Ġ", "cat"), ("m", "on")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    for text in WHOLE:
        vocab[text] = len(vocab)
    first_special = len(vocab)
    added = [ADDED | {"id": first_special + i, "content": x, "special": True} for i, x in enumerate(specials)]
    added.append(ADDED | {"id": first_special + len(specials), "content": "<tool_call>", "special": False})
    begins = {"type": "Sequence", "processors": [level(True), begins_with(specials[0], first_special)]}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": begins if has_bos else level(False), "decoder": level(True),
            "model": MODEL | {"ignore_merges": ignore_merges, "vocab": vocab,
                              "merges": merges if pairs else [" ".join(merge) for merge in merges]},
        },
    )  # fmt: skip
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
    base = {"added_tokens_decoder": decoder, "eos_token": specials[-1], "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", base | {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {}))


def write_llama3(folder: Path) -> None:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    config = {"bos_token": specials[0], "clean_up_tokenization_spaces": True}
    write_bpe(folder, split(LLAMA3_CUT), specials, ignore_merges=True, has_bos=True, config=config)


def write_qwen2(folder: Path) -> None:
    config = {"add_prefix_space": False, "bos_token": None, "add_bos_token": False, "pad_token": "<|endoftext|>",
              "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ x }}"}]}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    write_bpe(folder, split(QWEN2_CUT), specials, normalizer={"type": "NFC"}, config=config, pairs=True)


def write_nemo(folder: Path) -> None:
    config = {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    write_bpe(folder, split(TEKKEN_CUT), ["<s>", "<unk>", "</s>"], ignore_merges=True, has_bos=True, config=config)


def write_smollm(folder: Path) -> None:
    config = {"bos_token": "<|im_start|>", "add_prefix_space": False, "unk_token": "<|endoftext|>"}
    write_bpe(folder, DIGITS, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], config=config)


# name: its config, its tokenizer's writer
CHECKPOINTS = {
    "tinyllama": (TINYLLAMA, write_sentencepiece),
    "mistral": (MISTRAL, write_sentencepiece),
    "linear": (LINEAR, write_byte_fallback),
    "llama3": (LLAMA3, write_llama3),
    "nemo": (MISTRAL, write_nemo),
    "smollm": (SMOLLM, write_smollm),
    "qwen2": (QWEN2, write_qwen2),
}


def write_checkpoint(
    folder: Path, name: str, *, dtype: str = "BF16", n_shards: int = 2, **changes: object
) -> dict[str, np.ndarray]:
    """Writes all of it and returns the weights, as f32 before they are rounded to dtype."""
    config, write_tokenizer = CHECKPOINTS[name]
    config = config | changes
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tensors = make_tensors(config)
    write_weights(folder, tensors, dtype, n_shards)
    write_tokenizer(folder)
    return tensors
