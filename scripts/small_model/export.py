"""The trained network as a GGUF that any llama.cpp loads."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from torch import Tensor

from .net import FREQ_BASE, HEAD_DIM, N_ROTATED, RMS_EPS, UNROTATED, Net
from .tokenizer import BOS, CHAT_TEMPLATE, EOS

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(path: Path, net: Net, vocab: sentencepiece.SentencePieceProcessor, n_ctx: int, name: str) -> None:
    """Q8_0 matrices, f32 vectors."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        writer = gguf.GGUFWriter(part, "llama")
        add_hparams(writer, net, n_ctx, name)
        add_vocab(writer, vocab)
        for key, tensor in tensors(net).items():
            add_tensor(writer, key, tensor.detach().float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def add_hparams(writer: gguf.GGUFWriter, net: Net, n_ctx: int, name: str) -> None:
    shape = net.shape
    writer.add_name(name)
    writer.add_context_length(n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(FREQ_BASE)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def token_type(vocab: sentencepiece.SentencePieceProcessor, i: int) -> gguf.TokenType:
    if vocab.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if vocab.is_control(i):
        return gguf.TokenType.CONTROL
    if vocab.is_byte(i):
        return gguf.TokenType.BYTE
    return gguf.TokenType.USER_DEFINED if vocab.id_to_piece(i).startswith("<|") else gguf.TokenType.NORMAL


def add_vocab(writer: gguf.GGUFWriter, vocab: sentencepiece.SentencePieceProcessor) -> None:
    ids = range(vocab.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([vocab.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([vocab.get_score(i) for i in ids])
    writer.add_token_types([token_type(vocab, i) for i in ids])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def tensors(net: Net) -> dict[str, Tensor]:
    factors = torch.ones(HEAD_DIM // 2)
    factors[N_ROTATED:] = UNROTATED
    res = {
        "token_embd.weight": net.embd.weight,
        "output.weight": net.output.weight,
        "output_norm.weight": net.norm.weight,
        "rope_freqs.weight": factors,
    }
    for i, block in enumerate(net.blocks):
        parts = {
            "attn_norm": block.attn_norm, "attn_q": block.attn.q, "attn_k": block.attn.k, "attn_v": block.attn.v,
            "attn_output": block.attn.out, "ffn_norm": block.ffn_norm, "ffn_gate": block.gate, "ffn_up": block.up,
            "ffn_down": block.down,
        }  # fmt: skip
        res |= {f"blk.{i}.{key}.weight": part.weight for key, part in parts.items()}
    return res


def add_tensor(writer: gguf.GGUFWriter, key: str, data: np.ndarray) -> None:
    if data.ndim == 1:
        writer.add_tensor(key, data)
    else:
        writer.add_tensor(key, gguf.quants.quantize(data, Q8_0), raw_dtype=Q8_0)
