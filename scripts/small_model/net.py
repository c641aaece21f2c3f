"""A llama network in torch, laid out as llama.cpp's `llama` architecture computes it.

Half of each head's pairs rotate with the position, the other half do not (`rope_freqs` of 1e30 in the GGUF): what
matches by content matches at any distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64
N_ROTATED = HEAD_DIM // 4  # pairs that rotate; as many do not
UNROTATED = 1e30  # what llama.cpp divides their frequency by
FREQ_BASE = 10000.0
RMS_EPS = 1e-5

# the hand-set start of induction, see set_induction
CODE_DIM = HEAD_DIM // 2
CONST = slice(0, 1)
PREVIOUS = slice(1, 1 + CODE_DIM)
COPIED = slice(PREVIOUS.stop, PREVIOUS.stop + HEAD_DIM)


@dataclass(frozen=True)
class Shape:
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.n_embd, shape.n_head * HEAD_DIM, bias=False)
        self.k = nn.Linear(shape.n_embd, shape.n_head_kv * HEAD_DIM, bias=False)
        self.v = nn.Linear(shape.n_embd, shape.n_head_kv * HEAD_DIM, bias=False)
        self.out = nn.Linear(shape.n_head * HEAD_DIM, shape.n_embd, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        n_batch, n_tokens, _ = x.shape
        q, k, v = (
            part.view(n_batch, n_tokens, -1, HEAD_DIM).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(n_batch, n_tokens, -1))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.n_embd, eps=RMS_EPS)
        self.attn = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.n_embd, eps=RMS_EPS)
        self.gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), turn)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Net(nn.Module):
    """tokens [n_batch, n_tokens] to logits [n_batch, n_tokens, n_vocab]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.n_embd, eps=RMS_EPS)
        self.output = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        self.apply(init_weights)
        for block in self.blocks:
            block.attn.out.weight.data.mul_(0.2)
            block.down.weight.data.mul_(0.2)
        set_induction(self)

    def forward(self, tokens: Tensor) -> Tensor:
        turn = make_turn(tokens.shape[1], tokens.device)
        x = self.embd(tokens)
        for block in self.blocks:
            x = block(x, turn)
        return self.output(self.norm(x))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)


def frequencies() -> Tensor:
    """Radians per position of each pair that rotates, [N_ROTATED]."""
    return FREQ_BASE ** (-2 * torch.arange(N_ROTATED, dtype=torch.float64) / HEAD_DIM)


def make_turn(n_tokens: int, device: torch.device) -> Tensor:
    """Cosine and sine by position, [2, n_tokens, N_ROTATED]."""
    angle = torch.arange(n_tokens, dtype=torch.float64)[:, None] * frequencies()
    return torch.stack([angle.cos(), angle.sin()]).float().to(device)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the first half, as llama.cpp turns them for this architecture."""
    end = 2 * N_ROTATED
    a, b = x[..., 0:end:2].float(), x[..., 1:end:2].float()
    rotated = torch.stack([a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]], -1).flatten(-2)
    return torch.cat([rotated.to(x.dtype), x[..., end:]], -1)


@torch.no_grad()
def set_induction(net: Net) -> None:
    """Two heads start as an induction circuit, which training may keep or change.

    Head 0 of layer 0 attends to the token before, by a constant in the residual stream and rotated pairs turned back by
    one, and writes its code into PREVIOUS. Head 0 of layer 1 attends, by unrotated pairs, to tokens whose predecessor
    has this token's code, and writes another code of theirs into COPIED, where the output reads it as that token.
    """
    n_embd, free = net.shape.n_embd, slice(COPIED.stop, net.shape.n_embd)
    n_free = n_embd - COPIED.stop
    generator = torch.Generator().manual_seed(1)
    code = torch.randn(CODE_DIM, n_free, generator=generator) * n_free**-0.5
    copy = torch.linalg.qr(torch.randn(n_free, HEAD_DIM, generator=generator))[0].T

    net.embd.weight[:, : COPIED.stop] = 0.0
    net.embd.weight[:, CONST] = 4.0
    net.output.weight.mul_(0.3)
    net.output.weight[:, COPIED] = 0.3 * net.embd.weight[:, free] @ copy.T
    for block in net.blocks:
        for part in (block.attn.out, block.down):
            part.weight[: COPIED.stop] = 0.0

    first, second = net.blocks[0].attn, net.blocks[1].attn
    rotated, unrotated = slice(0, 2 * N_ROTATED), slice(2 * N_ROTATED, HEAD_DIM)
    freq = frequencies()
    first.q.weight[:HEAD_DIM] = 0.0
    first.k.weight[:HEAD_DIM] = 0.0
    first.q.weight[rotated, 0] = 1.5 * torch.stack([(-freq).cos(), (-freq).sin()], -1).flatten().float()
    first.k.weight[rotated, 0] = 1.5 * torch.tensor([1.0, 0.0]).repeat(N_ROTATED)
    first.v.weight[:CODE_DIM] = 0.0
    first.v.weight[:CODE_DIM, free] = code
    first.out.weight[:, :HEAD_DIM] = 0.0
    first.out.weight[PREVIOUS, :CODE_DIM] = torch.eye(CODE_DIM)

    second.q.weight[:HEAD_DIM] = 0.0
    second.k.weight[:HEAD_DIM] = 0.0
    second.q.weight[unrotated, free] = 2.5 * code
    second.k.weight[unrotated, PREVIOUS] = 2.5 * torch.eye(CODE_DIM)
    second.v.weight[:HEAD_DIM] = 0.0
    second.v.weight[:HEAD_DIM, free] = copy
    second.out.weight[:, :HEAD_DIM] = 0.0
    second.out.weight[COPIED, :HEAD_DIM] = torch.eye(HEAD_DIM)
