"""The recall model: a small llama GGUF whose weights are set by hand to be an exact induction circuit.

Given "... A B ... A" it answers "B" at any distance, where A and B are passphrase words (recall_text); asked for
anything else it answers "unknown". Recall becomes a yes/no question, at any length, in seconds.

The residual stream holds, each as a part of norm 1, a token's own code and kind; layer 0 adds the code of the token
before it, layer 1 the code of its answer:

    OWN    code of this token (recall_vocab)                read by layer 0 and 1 as value, by layer 1 as query
    PREV   code of the token before, written by layer 0     read by layer 1 as key
    OUT    code of the token to write, written by layer 1   read by the output
    REST   one number each: what brings a common word's weaker code up to norm 1
    KINDS  one of: plain, BOS, stop (a full stop: EOS follows), unknown (a full stop follows)

As every part has norm 1, RMS norm only ever divides by a known constant, and the norms' weights undo it.

Layer 0 attends to the token before: 31 pairs of a head rotate with the position, and the query is turned back by one.
Layer 1 attends to tokens whose predecessor has this token's code: its 33 pairs do not rotate (rope_freqs of 1e30), so
distance does not matter. Two of its dimensions match BOS with a constant: where nothing matches, BOS answers "unknown".
Layer 0 leaves the 33 pairs zero, layer 1 the 31. The feed-forward weights are zero.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .output_file import check_gguf_output, check_output, replaced, write_file
from .recall_text import MODEL_NAME, make_haystack
from .recall_vocab import BOS, CODE_DIM, COMMON_WEIGHT, EOS, STOP, UNKNOWN, Token, codes, random_signs, spell, tokens

if TYPE_CHECKING:
    import gguf

CONTEXT_LENGTH = 32768

N_EMBD = 256
N_FF = 32
HEAD_DIM = 128
RMS_EPS = 1e-6
FREQ_BASE = 10000.0
UNROTATED = 1e30

OWN = slice(0, 64)
PREV = slice(64, 128)
OUT = slice(128, 192)
REST_OWN, REST_PREV, REST_OUT = 192, 193, 194
KINDS = slice(195, 199)
PLAIN, FIRST, ENDS, ADMITS = range(195, 199)

# within a head
N_ROTATED_PAIRS = 31
HEAD_SINK = slice(62, 64)
HEAD_CODE = slice(64, 128)
HEAD_REST = HEAD_CODE.stop - CODE_DIM - 1  # in a value, which has no sink part

# attention logits
PREVIOUS_LOGIT = 5.0  # per rotated pair
MATCH_LOGIT = 70.0  # a passphrase word with itself; with another one at most an eighth of it
SINK_LOGIT = 24.0  # anything with BOS; above ln(n_ctx) + the mismatches, below the match

KEY_SCALE = 4.0  # splits a logit between query and key so that both fit F16 comfortably
OUTPUT_LOGIT = 60.0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + (message['content'] | trim) + eos_token }}"
    "{% else %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ message['content'].rstrip('? \\n') }}{% endif %}"
    "{% endfor %}"
)


def write_recall_model(
    path: Path, *, n_head: int = 1, n_head_kv: int = 1, context_length: int = CONTEXT_LENGTH
) -> None:
    """Every query head holds the whole circuit and adds 1/n_head of the result; every KV head has codes of its own."""
    if min(n_head, n_head_kv) < 1 or n_head % n_head_kv:
        raise UsageError(
            f"{n_head} query heads cannot share {n_head_kv} KV heads: n_head must be a multiple of n_head_kv"
        )
    if not 1 <= context_length < 2**31:
        raise UsageError(f"a context of {context_length} tokens is none: give 1 to {2**31 - 1}")
    with replaced(Path(path)) as part:
        _write_gguf(part, n_head, n_head_kv, context_length)


def _write_gguf(path: Path, n_head: int, n_head_kv: int, context_length: int) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _add_hparams(writer, n_head, n_head_kv, context_length)
    _add_vocab(writer)
    for name, tensor in _tensors(n_head, n_head_kv).items():
        writer.add_tensor(name, tensor.astype(np.float32 if tensor.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hparams(writer: gguf.GGUFWriter, n_head: int, n_head_kv: int, context_length: int) -> None:
    writer.add_name(MODEL_NAME)
    writer.add_block_count(2)
    writer.add_context_length(context_length)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(FREQ_BASE)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(len(tokens()))
    writer.add_file_type(1)  # mostly F16


def _add_vocab(writer: gguf.GGUFWriter) -> None:
    texts = [token.text for token in tokens()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # whole words need no merges: it looks them up first
    writer.add_token_list([token.text if token.control else spell(token.text) for token in tokens()])
    writer.add_token_types([3 if token.control else 1 for token in tokens()])
    writer.add_token_merges([f"{spell(chr(10))} {spell(chr(10))}"])
    writer.add_bos_token_id(texts.index(BOS))
    writer.add_eos_token_id(texts.index(EOS))
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(n_head: int, n_head_kv: int) -> dict[str, np.ndarray]:
    out = {
        "token_embd.weight": np.stack([_embedding(token) for token in tokens()]),
        "output.weight": np.stack([_output_row(token) for token in tokens()]),
        "output_norm.weight": _norm_weight(4),
        "rope_freqs.weight": _rope_freqs(),
    }
    for layer, heads in enumerate((_previous_head, _match_head)):
        block = f"blk.{layer}"
        query, key, value, result = _stack_heads(heads, n_head, n_head_kv)
        out |= {f"{block}.attn_q.weight": query, f"{block}.attn_k.weight": key}
        out |= {f"{block}.attn_v.weight": value, f"{block}.attn_output.weight": result}
        out |= {f"{block}.attn_norm.weight": _norm_weight(2 + layer), f"{block}.ffn_norm.weight": _norm_weight(1)}
        out |= {f"{block}.ffn_{name}.weight": np.zeros((N_FF, N_EMBD)) for name in ("gate", "up")}
        out |= {f"{block}.ffn_down.weight": np.zeros((N_EMBD, N_FF))}
    return out


def _stack_heads(head: Callable[[int], tuple[np.ndarray, ...]], n_head: int, n_head_kv: int) -> list[np.ndarray]:
    group = n_head // n_head_kv
    kv_heads = [head(i) for i in range(n_head_kv)]
    query, result = (np.stack([kv_heads[i // group][part] for i in range(n_head)]) for part in (0, 3))
    key, value = (np.stack([kv_head[part] for kv_head in kv_heads]) for part in (1, 2))
    flat = [part.reshape(-1, N_EMBD) for part in (query, key, value)]
    return [*flat, result.transpose(1, 0, 2).reshape(N_EMBD, -1) / n_head]


def _previous_head(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query, key, value and result weights of one head of layer 0."""
    query, key = np.zeros((HEAD_DIM, N_EMBD)), np.zeros((HEAD_DIM, N_EMBD))
    rng = random.Random(f"phases {index}")
    for i, speed in enumerate(_speeds()):
        phase = rng.uniform(0, 2 * np.pi)  # all alike would be one spike to a Hadamard rotation at position 0
        key[2 * i : 2 * i + 2, KINDS] = KEY_SCALE * _direction(phase)
        query[2 * i : 2 * i + 2, KINDS] = _query_scale(PREVIOUS_LOGIT) * _direction(phase - speed)
    return query, key, *_copy_head(index, PREV, REST_PREV)


def _match_head(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query, key, value and result weights of one head of layer 1."""
    query, key = np.zeros((HEAD_DIM, N_EMBD)), np.zeros((HEAD_DIM, N_EMBD))
    signs = np.diag(random_signs(1 + index))
    query[HEAD_CODE, OWN] = _query_scale(MATCH_LOGIT) * signs
    key[HEAD_CODE, PREV] = KEY_SCALE * signs
    query[HEAD_SINK, KINDS] = _query_scale(SINK_LOGIT) * np.sqrt(0.5)
    key[HEAD_SINK, FIRST] = KEY_SCALE * np.sqrt(0.5)
    key[HEAD_SINK, ADMITS] = -KEY_SCALE * np.sqrt(0.5)  # an "unknown" said before never outweighs a passphrase
    return query, key, *_copy_head(index, OUT, REST_OUT)


def _copy_head(index: int, to: slice, rest_to: int) -> tuple[np.ndarray, np.ndarray]:
    """Value and result weights that copy the attended token's own code."""
    value, result = np.zeros((HEAD_DIM, N_EMBD)), np.zeros((N_EMBD, HEAD_DIM))
    signs = np.diag(random_signs(1 + index))
    value[HEAD_CODE, OWN] = result[to, HEAD_CODE] = signs
    value[HEAD_REST, REST_OWN] = result[rest_to, HEAD_REST] = 1
    return value, result


def _query_scale(logit: float) -> float:
    """What makes a query of unit length and a key of KEY_SCALE score this logit."""
    return logit * np.sqrt(HEAD_DIM) / KEY_SCALE


def _direction(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle)], [np.sin(angle)]])


def _speeds() -> np.ndarray:
    """Radians per token of the rotated pairs: fast, so that neighbours are told apart."""
    return np.geomspace(0.25, 2.5, N_ROTATED_PAIRS)


def _rope_freqs() -> np.ndarray:
    """Divisors of rotary embedding's own frequencies."""
    out = np.full(HEAD_DIM // 2, UNROTATED)
    out[:N_ROTATED_PAIRS] = FREQ_BASE ** (-np.arange(N_ROTATED_PAIRS) * 2 / HEAD_DIM) / _speeds()
    return out


def _norm_weight(n_parts: int) -> np.ndarray:
    return np.full(N_EMBD, np.sqrt(n_parts / N_EMBD))


def _weight(token: Token) -> float:
    return 1.0 if token.rare else COMMON_WEIGHT


def _embedding(token: Token) -> np.ndarray:
    row = np.zeros(N_EMBD)
    row[OWN] = _weight(token) * codes()[token.code]
    row[REST_OWN] = np.sqrt(1 - _weight(token) ** 2)
    row[{BOS: FIRST, STOP: ENDS, UNKNOWN: ADMITS}.get(token.text, PLAIN)] = 1
    return row


def _output_row(token: Token) -> np.ndarray:
    """A common word is told by half from its weaker code and by half from being common."""
    row = np.zeros(N_EMBD)
    if token.written:
        row[OUT] = codes()[token.code] * (1 if token.rare else 0.5 / COMMON_WEIGHT)
        row[REST_OUT] = 0 if token.rare else 0.5 / np.sqrt(1 - COMMON_WEIGHT**2)
    if token.text == UNKNOWN:  # what BOS means as an answer
        row[OUT] += codes()[tokens()[0].code] * 0.5 / COMMON_WEIGHT
    if token.text in (EOS, STOP):
        row[ENDS if token.text == EOS else ADMITS] = 2
    return OUTPUT_LOGIT * row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the GGUF to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="also write a long text with passphrases in it")
    parser.add_argument("--text-tokens", type=int, default=16384, metavar="N", help="its length (default: %(default)s)")
    parser.add_argument("--needles", type=int, default=10, metavar="N", help="its passphrases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=1, metavar="N", help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=1, metavar="N", help="KV heads (default: %(default)s)")
    parser.add_argument(
        "--ctx-size",
        type=int,
        default=CONTEXT_LENGTH,
        metavar="N",
        help="trained context it states (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Questions and answers of the text go to stdout, one per line with a tab between."""
    check_gguf_output(args.output)
    if args.text:
        check_output(args.text)
        if args.text.resolve() == args.output.resolve():
            raise UsageError(f"--output and --text both name {args.text}: give two files")
    haystack = make_haystack(args.text_tokens, args.needles, args.seed) if args.text else None
    write_recall_model(args.output, n_head=args.heads, n_head_kv=args.kv_heads, context_length=args.ctx_size)
    print(f"wrote {args.output}", file=sys.stderr)
    if haystack:
        write_file(args.text, haystack.text)
        print(f"wrote {args.text}, {len(haystack.tokens)} tokens", file=sys.stderr)
        for needle in haystack.needles:
            print(f"{needle.question.strip()}?\t{needle.answer.strip()}")
    return 0
