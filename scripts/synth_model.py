#!/usr/bin/env python3
"""Writes a GGUF of a known model's shape with random weights: for benchmarks of speed, where text does not matter.

    python scripts/synth_model.py --shape tinyllama --type q4_0 -o tinyllama-q4_0.gguf
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int


SHAPES = {
    "tinyllama": Shape(22, 2048, 5632, 32, 4, 64, 32000, 2048),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "tiny": Shape(2, 128, 256, 2, 1, 64, 256, 2048),  # for a test
}

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "f16": gguf.GGMLQuantizationType.F16}


def random_weights(rng: np.random.Generator, rows: int, cols: int, kind: str) -> np.ndarray:
    """Values of standard deviation 1/sqrt(cols), the same random rows over and over: nobody looks at them."""
    rows_drawn = min(rows, 256)
    if kind == "f16":
        drawn = (rng.standard_normal((rows_drawn, cols)) * cols**-0.5).astype(np.float16)
    else:
        blocks = np.empty((rows_drawn, cols // 32, 18), np.uint8)
        # of mean 0 and standard deviation 4.3: with 0 as well every query would look at its own key only
        nibbles = rng.integers(1, 16, (2, rows_drawn, cols // 32, 16), np.uint8)
        blocks[:, :, :2] = np.array([cols**-0.5 / 4.3], np.float16).view(np.uint8)
        blocks[:, :, 2:] = nibbles[0] | nibbles[1] << 4
        drawn = blocks.reshape(rows_drawn, -1)
    return np.resize(drawn, (rows, drawn.shape[1]))


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    res = {"token_embd.weight": (shape.n_vocab, shape.n_embd), "output.weight": (shape.n_vocab, shape.n_embd)}
    for i in range(shape.n_layer):
        res |= {
            f"blk.{i}.attn_q.weight": (q, shape.n_embd),
            f"blk.{i}.attn_k.weight": (kv, shape.n_embd),
            f"blk.{i}.attn_v.weight": (kv, shape.n_embd),
            f"blk.{i}.attn_output.weight": (shape.n_embd, q),
            f"blk.{i}.ffn_gate.weight": (shape.n_ff, shape.n_embd),
            f"blk.{i}.ffn_up.weight": (shape.n_ff, shape.n_embd),
            f"blk.{i}.ffn_down.weight": (shape.n_embd, shape.n_ff),
        }
    return res


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")


def write_model(path: Path, shape: Shape, kind: str) -> None:
    rng = np.random.default_rng(0)
    temp = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(str(temp), "llama")
    add_metadata(writer, shape)
    for name, (rows, cols) in tensor_shapes(shape).items():
        writer.add_tensor(name, random_weights(rng, rows, cols, kind), raw_dtype=TYPES[kind])
    for name in ["output_norm", *(f"blk.{i}.{part}_norm" for i in range(shape.n_layer) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(shape.n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temp.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    write_model(args.output, SHAPES[args.shape], args.type)


if __name__ == "__main__":
    main()
