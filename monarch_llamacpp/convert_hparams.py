"""config.json as the numbers and keys that llama.cpp wants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .convert_source import read_json
from .errors import MonarchError

# by the name in config.json: GGUF architecture
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # its name at first
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}

MAX_SIZE = 2**24
MAX_NUMBER = 1e30  # fits f32
MAX_LAYERS = 512  # llama.cpp's own limit
ACTIVATION = "silu"
CONFIG = Path("config.json")


@dataclass(frozen=True)
class Hparams:
    arch: str
    n_vocab: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_type: str  # default, linear, yarn or llama3
    rope: dict[str, Any]
    tied: bool

    @property
    def is_permuted(self) -> bool:
        """llama.cpp turns neighbouring pairs for `llama`, halves for qwen2; Hugging Face always halves."""
        return self.arch == "llama"


def read_hparams(folder: Path) -> Hparams:
    path = folder / CONFIG
    config = read_json(path)
    if not config:
        raise MonarchError(f"{path} is missing; is {folder} a Hugging Face checkpoint?")
    arch = find_arch(path, config)
    refuse_quantized(path, config)
    n_embd, n_head = size(path, config, "hidden_size"), size(path, config, "num_attention_heads")
    n_head_kv = size(path, config, "num_key_value_heads", n_head)
    head_dim = size(path, config, "head_dim", max(1, n_embd // n_head))
    if arch == "qwen2" and head_dim * n_head != n_embd:
        raise MonarchError(f"{path}: head_dim is {head_dim}; llama.cpp takes qwen2 only with hidden_size / heads")
    if n_head % n_head_kv or head_dim % 2 or (config.get("head_dim") is None and n_embd % n_head):
        raise MonarchError(f"{path}: {n_embd} values do not make {n_head} heads over {n_head_kv} KV heads")
    rope_type, rope = find_rope(path, config)
    return Hparams(
        arch=arch,
        n_vocab=size(path, config, "vocab_size"),
        n_ctx=size(path, config, "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=size(path, config, "intermediate_size"),
        n_layer=size(path, config, "num_hidden_layers", most=MAX_LAYERS),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        rms_eps=number(path, config, "rms_norm_eps", 1e-6),
        rope_theta=number(path, {**config, **rope}, "rope_theta", 10000.0),
        rope_type=rope_type,
        rope=rope,
        tied=config.get("tie_word_embeddings") is True,
    )


def find_arch(path: Path, config: dict) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MonarchError(f"{path}: the architecture {name} is not supported; convert knows {known}")
    if config.get("hidden_act", ACTIVATION) != ACTIVATION:
        raise MonarchError(f"{path}: the activation {config['hidden_act']} is not supported, only {ACTIVATION}")
    return ARCHITECTURES[name]


def refuse_quantized(path: Path, config: dict) -> None:
    if config.get("quantization_config"):
        raise MonarchError(f"{path}: the checkpoint is quantised; convert needs bf16, f16 or f32 weights")


def size(path: Path, config: dict, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise MonarchError(f"{path}: {key} is {value!r:.40}; expected 1 to {most}")
    return value


def number(path: Path, config: dict, key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
        raise MonarchError(f"{path}: {key} is {value!r:.40}; expected a positive number")
    return float(value)


def find_rope(path: Path, config: dict) -> tuple[str, dict]:
    """Older files name it rope_scaling, newer ones rope_parameters, with the base in it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise MonarchError(f"{path}: rope_scaling is {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise MonarchError(f"{path}: the rope scaling {kind!r} is not supported, only linear, yarn and llama3")
    return kind, rope


def add_hparams(writer: gguf.GGUFWriter, hparams: Hparams) -> None:
    writer.add_block_count(hparams.n_layer)
    writer.add_context_length(hparams.n_ctx)
    writer.add_embedding_length(hparams.n_embd)
    writer.add_feed_forward_length(hparams.n_ff)
    writer.add_head_count(hparams.n_head)
    writer.add_head_count_kv(hparams.n_head_kv)
    writer.add_layer_norm_rms_eps(hparams.rms_eps)
    writer.add_rope_freq_base(hparams.rope_theta)
    if hparams.arch == "llama":
        writer.add_key_length(hparams.head_dim)
        writer.add_value_length(hparams.head_dim)
        writer.add_vocab_size(hparams.n_vocab)
        writer.add_rope_dimension_count(hparams.head_dim)
    add_rope_scaling(writer, hparams)


def add_rope_scaling(writer: gguf.GGUFWriter, hparams: Hparams) -> None:
    if hparams.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_number(hparams, "factor"))
    if hparams.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope_number(hparams, "factor"))
        writer.add_rope_scaling_orig_ctx_len(size(CONFIG, hparams.rope, "original_max_position_embeddings"))
        for key, add in yarn_options(writer).items():
            if hparams.rope.get(key) is not None:
                add(rope_number(hparams, key))


def yarn_options(writer: gguf.GGUFWriter) -> dict[str, Callable[[float], None]]:
    return {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }


def rope_number(hparams: Hparams, key: str, default: float | None = None) -> float:
    return number(CONFIG, hparams.rope, key, default)


def rope_factors(hparams: Hparams) -> np.ndarray:
    """What llama3 divides each pair's frequency by, [head_dim/2] f32: slow ones by factor, fast ones by 1."""
    factor = rope_number(hparams, "factor", 8.0)
    low = rope_number(hparams, "low_freq_factor", 1.0)
    high = rope_number(hparams, "high_freq_factor", 4.0)
    n_ctx = rope_number(hparams, "original_max_position_embeddings", 8192)
    exponent = np.arange(0, hparams.head_dim, 2, dtype=np.float32) / np.float32(hparams.head_dim)
    wavelength = 2 * math.pi * np.float64(hparams.rope_theta) ** exponent.astype(np.float64)
    turns = n_ctx / wavelength
    ramp = np.clip((turns - low) / (high - low) if high != low else (turns > low), 0.0, 1.0)
    return (1.0 / ((1.0 - ramp) / factor + ramp)).astype(np.float32)
