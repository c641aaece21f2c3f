"""Small random models in GGUF for tests: llama, qwen2 and qwen3 architectures of any head size."""

from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 96


def _tokens() -> list[str]:
    return ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(N_VOCAB - 3)]


def write_random_model(
    path: Path,
    *,
    arch: str = "llama",
    head_dim: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layer: int = 2,
    n_ctx: int = 4096,
    seed: int = 0,
) -> Path:
    """Writes an f32 model whose attention is neither flat nor a single spike, so that errors in K and V show."""
    rng = np.random.default_rng(seed)
    n_embd, n_ff = n_head * head_dim if arch == "qwen2" else 128, 192  # llama.cpp ties them in qwen2
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_tokens())
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * (N_VOCAB - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int, scale: float) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    def add_norm(name: str, n: int) -> None:
        writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))

    add("token_embd.weight", N_VOCAB, n_embd, scale=1.0)
    add("output.weight", N_VOCAB, n_embd, scale=n_embd**-0.5)
    add_norm("output_norm.weight", n_embd)
    for i in range(n_layer):
        add(f"blk.{i}.attn_q.weight", n_head * head_dim, n_embd, scale=n_embd**-0.5)
        add(f"blk.{i}.attn_k.weight", n_head_kv * head_dim, n_embd, scale=n_embd**-0.5)
        add(f"blk.{i}.attn_v.weight", n_head_kv * head_dim, n_embd, scale=n_embd**-0.5)
        add(f"blk.{i}.attn_output.weight", n_embd, n_head * head_dim, scale=2.0 * (n_head * head_dim) ** -0.5)
        add(f"blk.{i}.ffn_gate.weight", n_ff, n_embd, scale=n_embd**-0.5)
        add(f"blk.{i}.ffn_up.weight", n_ff, n_embd, scale=n_embd**-0.5)
        add(f"blk.{i}.ffn_down.weight", n_embd, n_ff, scale=n_ff**-0.5)
        add_norm(f"blk.{i}.attn_norm.weight", n_embd)
        add_norm(f"blk.{i}.ffn_norm.weight", n_embd)
        if arch == "qwen2":
            add(f"blk.{i}.attn_q.bias", n_head * head_dim, scale=0.5)
            add(f"blk.{i}.attn_k.bias", n_head_kv * head_dim, scale=0.5)
            add(f"blk.{i}.attn_v.bias", n_head_kv * head_dim, scale=0.5)
        if arch == "qwen3":
            add_norm(f"blk.{i}.attn_q_norm.weight", head_dim)
            add_norm(f"blk.{i}.attn_k_norm.weight", head_dim)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
