"""Small random models of every architecture that native/monarch-archs.def lists.

Only metadata is given: llama.cpp itself asks for the tensors that an architecture has, in their shapes
(metadata_model.py).
"""

import re
from pathlib import Path
from typing import Any

import gguf

N_VOCAB = 96
N_EMBD, N_HEAD, N_HEAD_KV, N_LAYER = 256, 4, 2, 2

Metadata = dict[str, Any]

# keys without the architecture's name, or with a dot before them where it is not part of the key; those that an
# architecture does not know do nothing
COMMON: Metadata = {
    "vocab_size": N_VOCAB,
    "context_length": 1024,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": 384,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.clamp_kqv": 4.0,
    "logit_scale": 0.5,
    "use_parallel_residual": True,
}

EXPERTS: Metadata = {
    "expert_count": 4,
    "expert_used_count": 4,  # no expert is left out by a last bit
    "expert_feed_forward_length": 128,
    "expert_shared_feed_forward_length": 64,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
}

ALL_HEADS: Metadata = {"attention.head_count_kv": N_HEAD}  # its tensors leave no other choice

# what llm_arch calls it without its prefix: GGUF's name if it is another, and keys of its own
ARCHITECTURES: dict[str, tuple[str, Metadata]] = {
    "APERTUS": ("", {".xielu." + name: 1.0 for name in ("alpha_n", "alpha_p", "beta", "eps")}),
    "ARCEE": ("", {}),
    "BAILINGMOE": ("", EXPERTS),
    "BITNET": ("", {}),
    "CHATGLM": ("", {}),
    "CODESHELL": ("", {}),
    "COMMAND_R": ("command-r", {}),
    "DBRX": ("", EXPERTS),
    "DEEPSEEK": ("", EXPERTS),
    "DOTS1": ("", EXPERTS | ALL_HEADS),
    "ERNIE4_5": ("", {}),
    "ERNIE4_5_MOE": ("ernie4_5-moe", EXPERTS),
    "EXAONE": ("", {}),
    "FALCON": ("", {}),
    "GEMMA": ("", {}),
    "GLM4": ("", {}),
    "GPT2": ("", ALL_HEADS),
    "GPTNEOX": ("", ALL_HEADS),
    "GRANITE": ("", {"attention.scale": 0.2, "residual_scale": 0.5, "embedding_scale": 2.0}),
    "GRANITE_MOE": ("granitemoe", EXPERTS | {"attention.scale": 0.2}),
    "HUNYUAN_DENSE": ("hunyuan-dense", {}),
    "HUNYUAN_MOE": ("hunyuan-moe", EXPERTS),
    "INTERNLM2": ("", {}),
    "JAIS2": ("", {}),
    "LLAMA": ("", {}),
    "MAINCODER": ("", {}),
    "MINICPM": ("", {}),
    "MINIMAX_M2": ("minimax-m2", EXPERTS),
    "MISTRAL3": ("", {"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 128}),
    "NEMOTRON": ("", {}),
    "OLMO": ("", {}),
    "OLMO2": ("", {}),
    "OLMOE": ("", EXPERTS | ALL_HEADS),
    "ORION": ("", {}),
    "PHI2": ("", {}),
    "PHI3": ("", {}),
    "PHIMOE": ("", EXPERTS),
    "PLAMO": ("", {}),
    "QWEN": ("", ALL_HEADS),
    "QWEN2": ("", {}),
    "QWEN2MOE": ("", EXPERTS),
    "QWEN3": ("", {}),
    "QWEN3MOE": ("", EXPERTS),
    "SEED_OSS": ("", {}),
    "SMOLLM3": ("", {"block_count": 4}),  # every fourth layer has no positions
    "STABLELM": ("", {}),
    "STARCODER": ("", ALL_HEADS),
    "STARCODER2": ("", {}),
    "XVERSE": ("", {}),
}


def listed(native: Path) -> list[str]:
    return re.findall(r"^MONARCH_ARCH\((\w+)\)$", (native / "monarch-archs.def").read_text(), re.MULTILINE)


def write_metadata(path: Path, name: str, extra: Metadata) -> Path:
    writer = gguf.GGUFWriter(str(path), name)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in (COMMON | extra).items():
        add[type(value)](key[1:] if key[0] == "." else f"{name}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(N_VOCAB - 3)])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * (N_VOCAB - 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
