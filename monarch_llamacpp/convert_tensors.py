"""Which tensors the GGUF holds, and how each is read, turned and written, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from rich.progress import Progress

from .convert_hparams import Hparams, rope_factors
from .convert_safetensors import Checkpoint, Tensor, to_f32
from .errors import MonarchError

SLICE_VALUES = 2**22  # as f32: 16 MiB

QWEN2_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
IGNORED = ".rotary_emb.inv_freq"  # old checkpoints store what rope_theta says


@dataclass(frozen=True)
class Outtype:
    file_type: gguf.LlamaFileType
    type: gguf.GGMLQuantizationType


OUTTYPES = {
    "f16": Outtype(gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "bf16": Outtype(gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "q8_0": Outtype(gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
    "f32": Outtype(gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
}


@dataclass(frozen=True)
class Plan:
    """One tensor of the output."""

    name: str
    type: gguf.GGMLQuantizationType
    source: Tensor | np.ndarray
    rows: np.ndarray | None = None  # order of the source's rows, if another

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        return gguf.quant_shape_to_byte_shape(self.source.shape, self.type)

    def slices(self) -> Iterator[np.ndarray]:
        """The data, in order."""
        values = self.source.open() if isinstance(self.source, Tensor) else self.source
        step = max(1, SLICE_VALUES // values[0].size)
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            yield self._encode(to_f32(values[part if self.rows is None else self.rows[part]]))

    def _encode(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            res = gguf.quants.quantize(values, self.type)
        halves = half_floats(res, self.type)
        if halves is not None and not np.isfinite(halves).all():
            kind = self.type.name.lower()
            raise MonarchError(f"{self.source.name} holds values that {kind} cannot; convert with --outtype bf16")
        return res


def half_floats(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray | None:
    """What of the data is f16, which holds less than f32: all of it, or the scales of blocks."""
    if kind == gguf.GGMLQuantizationType.F16:
        return data
    if kind == gguf.GGMLQuantizationType.Q8_0:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        return data.reshape(-1, size)[:, :2].copy().view(np.float16)
    return None


def plan_tensors(checkpoint: Checkpoint, hparams: Hparams, outtype: str) -> list[Plan]:
    """Every tensor that the architecture needs, in its right shape, and nothing unknown."""
    shapes = expected_shapes(hparams)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[hparams.arch.upper()], hparams.n_layer)
    plans = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(IGNORED):
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name not in shapes:
            raise MonarchError(f"the tensor {tensor.name} is not part of a {hparams.arch} model with these sizes")
        if name in plans:
            raise MonarchError(f"{tensor.name} and {plans[name].source.name} are the same tensor; which one is meant?")
        plans[name] = plan_tensor(name, tensor, shapes[name], hparams, outtype)
    missing = [name for name in shapes if name not in plans and not is_optional(name, hparams)]
    if missing:
        more = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise MonarchError(f"the checkpoint lacks {missing[0]}{more}; fetch it again")
    return rope_plan(hparams) + list(plans.values())


def plan_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], hparams: Hparams, outtype: str) -> Plan:
    if tensor.shape != shape:
        raise MonarchError(f"{tensor.name} has the shape {list(tensor.shape)}; config.json says {list(shape)}")
    n_head = {"attn_q": hparams.n_head, "attn_k": hparams.n_head_kv}.get(name.split(".")[-2])
    rows = permutation(shape[0], n_head) if hparams.is_permuted and n_head else None
    return Plan(name, tensor_type(name, shape, outtype), tensor, rows)


def tensor_type(name: str, shape: tuple[int, ...], outtype: str) -> gguf.GGMLQuantizationType:
    """Vectors stay f32, and a row that no block of 32 fills becomes f16, as upstream does."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    res = OUTTYPES[outtype].type
    block_size, _ = gguf.GGML_QUANT_SIZES[res]
    return res if shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16


def permutation(n_rows: int, n_head: int) -> np.ndarray:
    """Rows of Q or K so that the halves that Hugging Face turns together become neighbours."""
    return np.arange(n_rows).reshape(n_head, 2, n_rows // n_head // 2).swapaxes(1, 2).ravel()


def expected_shapes(hparams: Hparams) -> dict[str, tuple[int, ...]]:
    n_embd, n_ff = hparams.n_embd, hparams.n_ff
    n_q, n_kv = hparams.n_head * hparams.head_dim, hparams.n_head_kv * hparams.head_dim
    res = {
        "token_embd.weight": (hparams.n_vocab, n_embd),
        "output.weight": (hparams.n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
    }
    block = {
        "attn_norm.weight": (n_embd,), "ffn_norm.weight": (n_embd,),
        "attn_q.weight": (n_q, n_embd), "attn_k.weight": (n_kv, n_embd), "attn_v.weight": (n_kv, n_embd),
        "attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,),
        "attn_output.weight": (n_embd, n_q), "attn_output.bias": (n_embd,),
        "ffn_gate.weight": (n_ff, n_embd), "ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff),
        "ffn_gate.bias": (n_ff,), "ffn_up.bias": (n_ff,), "ffn_down.bias": (n_embd,),
    }  # fmt: skip
    if hparams.arch == "qwen2":
        block = {name: shape for name, shape in block.items() if name.endswith(".weight") or name in QWEN2_BIASES}
    for layer in range(hparams.n_layer):
        res |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return res


def is_optional(name: str, hparams: Hparams) -> bool:
    """Biases, but for qwen2's; the output, where it shares the embedding's weights."""
    return hparams.tied if name == "output.weight" else name.endswith(".bias") and hparams.arch != "qwen2"


def rope_plan(hparams: Hparams) -> list[Plan]:
    if hparams.rope_type != "llama3":
        return []
    name = "rope_freqs.weight"
    return [Plan(name, gguf.GGMLQuantizationType.F32, rope_factors(hparams))]


def write_tensors(writer: gguf.GGUFWriter, plans: list[Plan], progress: Progress) -> None:
    for plan in plans:
        shape = plan.bytes_shape
        writer.add_tensor_info(plan.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=plan.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    task = progress.add_task("convert", total=sum(int(np.prod(plan.bytes_shape)) for plan in plans))
    for plan in plans:
        data = np.empty(plan.bytes_shape, np.uint8)
        at = 0
        for part in plan.slices():
            part = part.view(np.uint8)
            data[at : at + len(part)] = part.reshape(len(part), -1) if data.ndim == 2 else part
            at += len(part)
            progress.advance(task, part.nbytes)
        writer.write_tensor_data(data)
