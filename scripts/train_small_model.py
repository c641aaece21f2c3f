#!/usr/bin/env python3
"""Trains the small model that ships, from scratch: real language from novels, and recall from generated tasks.

    python scripts/train_small_model.py --novels NOVELS --work DIR [--out FILE.gguf]

NOVELS: a folder or a tar archive of text files; models/README.md says which.

Needs torch and sentencepiece: `pip install -e '.[train]'`. Stops and resumes at any time: WORK keeps the
vocabulary and the last checkpoint, and every batch follows from the seed and its step. Runs on CPU and CUDA alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_model import tokenizer  # noqa: E402
from small_model.data import Corpus, Mixture, draw_batch  # noqa: E402
from small_model.export import write_gguf  # noqa: E402
from small_model.net import Net, Shape  # noqa: E402
from small_model.novels import read_novels, split_novels  # noqa: E402

SEED = 20261121


@dataclass(frozen=True)
class Phase:
    n_steps: int  # of N_STEPS; other numbers of steps are divided alike
    n_tokens: int  # length of a sequence
    mixture: Mixture
    divide: int = 1  # the preset's tokens in a step


# Short and dense first: recall comes from many steps on it, and has to stay while the texts grow. Plain wordings first,
# all of them once asking and answering is learned.
LATER = Mixture(repeat=0.05, lists=0.05, facts=0.3, chats=0.15, varied=True)
PHASES = (
    Phase(144, 256, Mixture(repeat=0.5, lists=0.3, facts=0.1)),
    Phase(556, 512, Mixture(repeat=0.1, lists=0.1, facts=0.3)),
    Phase(102, 1024, LATER),
    Phase(148, 1024, LATER, divide=2),
    Phase(170, 2048, LATER, divide=2),
    Phase(80, 4096, LATER, divide=2),
)
# a second time, with mostly questions: what brings answers of several tokens wholly right is many steps at low rates
LAST = Mixture(repeat=0.05, lists=0.1, facts=0.5, chats=0.15, varied=True)
LAST_PHASES = (Phase(500, 512, LAST), Phase(300, 1024, LAST), Phase(200, 2048, LAST), Phase(100, 4096, LAST))

N_WARM_UP, N_PLATEAU = 18, 720  # of N_STEPS, as are the next two
N_FIRST = sum(phase.n_steps for phase in PHASES)
N_STEPS = N_FIRST + sum(phase.n_steps for phase in LAST_PHASES)
LAST_RATE = 0.5


@dataclass(frozen=True)
class Preset:
    shape: Shape
    n_steps: int
    step_tokens: int
    n_ctx: int
    lr: float
    stretch: int = 1  # of the phases' sequence lengths


PRESETS = {
    "tiny": Preset(Shape(512, 192, 2, 2, 1, 256), 20, 512, 256, 0.01),
    "cpu": Preset(Shape(2048, 256, 6, 4, 2, 768), N_STEPS, 8192, 4096, 0.01),
    "gpu": Preset(Shape(2048, 448, 9, 7, 1, 1280), 6000, 131072, 8192, 0.01, stretch=2),
}


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Keller Jordan, 2024)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in {param.shape for param in group["params"]}:
                self.step_shape([param for param in group["params"] if param.shape == shape], group)

    def step_shape(self, params: list[nn.Parameter], group: dict) -> None:
        for param in params:
            state = self.state[param]
            state.setdefault("momentum", torch.zeros_like(param)).lerp_(param.grad, 1 - group["momentum"])
        update = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
        update = orthogonalize(update) * max(1, update.shape[1] / update.shape[2]) ** 0.5
        for param, change in zip(params, update, strict=True):
            param.mul_(1 - 0.1 * group["lr"]).add_(change.to(param.dtype), alpha=-group["lr"])


def orthogonalize(x: Tensor) -> Tensor:
    """Newton-Schulz iterations on a stack of matrices, towards singular values of 1."""
    x = x.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def make_optimizers(net: Net, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [param for param in net.blocks.parameters() if param.ndim == 2]
    vectors = [param for param in net.parameters() if param.ndim < 2]
    tables = [net.embd.weight, net.output.weight]
    groups = [{"params": tables, "lr": 0.3 * lr}, {"params": vectors, "lr": 0.1 * lr}]
    return [Muon(matrices, lr), torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)]


def rate(step: int, n_steps: int) -> float:
    """Warm-up, a plateau, down to nothing; then all of it lower and without a plateau."""
    at = step * N_STEPS / n_steps
    if at < N_FIRST:
        return min(1.0, at / N_WARM_UP, (N_FIRST - at) / (N_FIRST - N_PLATEAU) + 0.001)
    return LAST_RATE * min((at - N_FIRST) / N_WARM_UP, (N_STEPS - at) / (N_STEPS - N_FIRST)) + 0.001


def find_phase(step: int, n_steps: int) -> Phase:
    at = step * N_STEPS / n_steps
    for phase in PHASES + LAST_PHASES:
        if at < phase.n_steps:
            return phase
        at -= phase.n_steps
    return LAST_PHASES[-1]


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.preset = args, PRESETS[args.preset]
        self.n_steps = args.steps or self.preset.n_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        texts, kept_out = split_novels(read_novels(args.novels))
        self.vocab = tokenizer.load(self.load_vocab(texts))
        self.corpus = Corpus(texts, self.vocab)
        self.validation = Corpus(kept_out, self.vocab)
        torch.manual_seed(SEED)
        self.net = Net(self.preset.shape).to(self.device)
        self.forward = torch.compile(self.net, dynamic=False) if args.compile else self.net
        self.optimizers = make_optimizers(self.net, self.preset.lr)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.step = 0

    def load_vocab(self, texts: list[str]) -> bytes:
        path = self.work / "vocab.model"
        if not path.exists():
            path.write_bytes(tokenizer.train(texts, self.preset.shape.n_vocab, SEED))
        return path.read_bytes()

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint.pt"

    def save(self) -> None:
        part = self.checkpoint.with_suffix(".part")
        state = {"step": self.step, "net": self.net.state_dict()}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, part)
        part.replace(self.checkpoint)

    def resume(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.step = state["step"]
            self.net.load_state_dict(state["net"])
            for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(part)

    def loss(self, corpus: Corpus, mixture: Mixture, n_rows: int, n_tokens: int, seed: int, step: int) -> Tensor:
        tokens, weights = draw_batch(corpus, mixture, n_rows, n_tokens, seed, step)
        batch = torch.from_numpy(tokens).to(self.device)
        weight = torch.from_numpy(weights).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = (self.forward if torch.is_grad_enabled() else self.net)(batch[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        return (losses * weight.flatten()).sum() / weight.sum().clamp(min=1)

    def train_step(self) -> float:
        phase = find_phase(self.step, self.n_steps)
        n_tokens = phase.n_tokens * self.preset.stretch if self.args.preset != "tiny" else 128
        n_rows = max(1, self.preset.step_tokens // phase.divide // n_tokens)
        loss = self.loss(self.corpus, phase.mixture, n_rows, n_tokens, SEED, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, base in zip(groups, self.rates, strict=True):
            group["lr"] = base * rate(self.step, self.n_steps)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, mixture: Mixture, n_tokens: int) -> float:
        """Share of answers' tokens that are right, on novels not trained on."""
        tokens, weights = draw_batch(self.validation, mixture, 8, n_tokens, SEED + 1, 0)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.net(torch.from_numpy(tokens[:, :-1]).to(self.device))
        right = logits.argmax(-1).cpu().numpy() == tokens[:, 1:]
        return float(right[weights == weights.max()].mean())

    def report(self) -> dict[str, float]:
        n = min(512, self.preset.n_ctx)
        with torch.no_grad():
            text = float(self.loss(self.validation, Mixture(0, 0, 0), 4, n, SEED + 2, 0))
        return {
            "text_loss": round(text, 3),
            "repeat": round(self.accuracy(Mixture(1.0, 0, 0), n), 3),
            "lists": round(self.accuracy(Mixture(0, 1.0, 0), n), 3),
            "answers": round(self.accuracy(Mixture(0, 0, 1.0), n), 3),
            "answers_long": round(self.accuracy(Mixture(0, 0, 1.0), self.preset.n_ctx), 3),
        }

    def train(self) -> None:
        self.resume()
        started = saved = time.monotonic()
        while self.step < self.n_steps:
            loss = self.train_step()
            now = time.monotonic()
            if self.step % self.args.every == 0 or self.step == self.n_steps:
                line = {"step": self.step, "loss": round(loss, 3), "minutes": round((now - started) / 60, 1)}
                print(json.dumps(line | self.report()), flush=True)
            if now - saved > 120 or self.step == self.n_steps:
                self.save()
                saved = now
            if self.args.minutes and now - started > 60 * self.args.minutes:
                self.save()
                break

    def export(self, path: Path) -> None:
        write_gguf(path, self.net, self.vocab, self.preset.n_ctx, "monarch small")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", type=Path, required=True, help="folder or tar archive of .txt files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the vocabulary and the checkpoint")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--minutes", type=float, help="stop after this time; run again to go on")
    parser.add_argument("--every", type=int, default=50, help="steps between reports")
    parser.add_argument("--compile", action="store_true", help="a fifth faster on a CPU; needs a C++ compiler")
    parser.add_argument("--out", type=Path, help="write the GGUF when done")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    run = Run(args)
    run.train()
    if args.out:
        run.export(args.out)


if __name__ == "__main__":
    main()
