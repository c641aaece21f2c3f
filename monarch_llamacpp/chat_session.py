"""One conversation with a model: tokens, template, decoding, stopping. Prints nothing."""

from __future__ import annotations

import ctypes
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import MonarchError
from .llama import Llama, llama_cpp  # llama_cpp as that module loaded it: on the patched library
from .template import ChatTemplate, Message, PlainText, Template
from .utf8_stream import Utf8Stream

# as llama-cli
TOP_K = 40
TOP_P = 0.95
MIN_P = 0.05

Progress = Callable[[int, int], None]


class Stopped(Exception):
    """Ctrl-C, between two graphs or two nodes of one: what was decoded before stays."""


class ContextFull(MonarchError):
    def __init__(self, what: str, n_tokens: int, n_ctx: int) -> None:
        size = f"{what} {n_tokens} tokens of {n_ctx}"
        super().__init__(f"context full: {size}; /clear starts anew, --ctx-size N makes it larger")


# a terminal that closes, a system that shuts down: the conversation ends as by /exit, and is kept
_ENDS = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]


class Interrupts:
    """Counts Ctrl-C while the model works; elsewhere that raises KeyboardInterrupt as usual. An end is two."""

    def __init__(self) -> None:
        self.count = 0
        self._end: int | None = None
        self._working = False
        self._keeping = False

    def install(self) -> None:
        # Python calls its handler once for signals that arrive during one C call: the bytes tell how many they were
        self._received, self._wakeup = socket.socketpair()
        self._received.setblocking(False)
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._handle)
        for end in _ENDS:
            if signal.getsignal(end) != signal.SIG_IGN:  # nohup
                signal.signal(end, self._handle)

    @contextmanager
    def working(self) -> Iterator[None]:
        self.count = 0
        self._working = True
        try:
            yield
        finally:
            self._working = False

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """What is done at the end anyway: an end that comes now waits for it."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def leave(self) -> NoReturn:
        if self._end:
            raise SystemExit(128 + self._end)
        raise KeyboardInterrupt

    def leave_if_ended(self) -> None:
        """An end may come with the last token, when nothing is left to stop."""
        if self._end:
            self.leave()

    def _handle(self, number: int, _frame: Any) -> None:
        with suppress(BlockingIOError):
            self.count += self._received.recv(64).count(signal.SIGINT)
        if number in _ENDS:
            if self._end or self._keeping:
                return  # it is ending
            self._end = number
            self.count += 2
        if not self._working:
            self.leave()


@dataclass
class Sampling:
    temp: float = 0.8
    seed: int = llama_cpp.LLAMA_DEFAULT_SEED


@dataclass
class Turn:
    """What one answer took."""

    n_reused: int = 0
    n_prompt: int = 0
    prompt_s: float = 0.0
    n_answer: int = 0
    answer_s: float = 0.0
    text: str = ""
    error: MonarchError | None = None
    stopped: bool = False

    @property
    def answered(self) -> bool:
        """Wholly, or as far as it came."""
        return self.n_answer > 0 or not (self.stopped or self.error)


class Decoder:
    """The tokens that the cache holds, and the ways to change them."""

    def __init__(self, llm: Llama, interrupts: Interrupts) -> None:
        self._ctx = llm.ctx
        self._memory = llama_cpp.llama_get_memory(llm.ctx)
        self._interrupts = interrupts
        self._n_batch = llm.n_batch
        self.n_ctx: int = llm.n_ctx()
        self.held: list[int] = []
        # ctypes runs Python's signal handlers only inside a callback: this one is called for every node of a graph
        self._abort = llama_cpp.ggml_abort_callback(lambda _data: self._interrupts.count > 0)
        self._never = llama_cpp.ggml_abort_callback()

    def read(self, tokens: list[int], on_progress: Progress) -> int:
        """Makes the cache hold exactly these tokens; returns how many it held already."""
        if len(tokens) > self.n_ctx:
            raise ContextFull("the conversation needs", len(tokens), self.n_ctx)
        # the last token is decoded in any case: its logits choose the next
        self._cut(min(_common_prefix(self.held, tokens), len(tokens) - 1))
        reused = len(self.held)
        with self._abortable():
            while len(self.held) < len(tokens):
                on_progress(len(self.held) - reused, len(tokens) - reused)
                self.append(tokens[len(self.held) : len(self.held) + self._n_batch])
        return reused

    def append(self, tokens: list[int]) -> None:
        if self._interrupts.count:
            raise Stopped
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        result = llama_cpp.llama_decode(self._ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if result != 0:
            # nothing of the batch counts: a part of it may have been decoded
            self._cut(len(self.held))
            raise self._failure(result)
        self.held += tokens

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self.held = []

    def _cut(self, n_keep: int) -> None:
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, n_keep, -1):
            # a recurrent model cannot forget a part: it reads everything again
            self.clear()
        del self.held[n_keep:]

    def _failure(self, result: int) -> Exception:
        if result == 2:
            return Stopped()
        if result == 1:
            return ContextFull("the conversation fills", len(self.held), self.n_ctx)
        return MonarchError(f"llama_decode failed with {result}: start again with --debug to see what llama.cpp says")

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        # not while generating: one token is short, and the callback costs time at every node
        llama_cpp.llama_set_abort_callback(self._ctx, self._abort, None)
        try:
            yield
        finally:
            llama_cpp.llama_set_abort_callback(self._ctx, self._never, None)


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Sampler:
    """llama.cpp's sampler chain; temperature 0 is greedy."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, ctx: Any) -> int:
        return llama_cpp.llama_sampler_sample(self._chain, ctx, -1)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


def _samplers(sampling: Sampling) -> list[Any]:
    if sampling.temp == 0:
        return [llama_cpp.llama_sampler_init_greedy()]
    return [
        llama_cpp.llama_sampler_init_top_k(TOP_K),
        llama_cpp.llama_sampler_init_top_p(TOP_P, 1),
        llama_cpp.llama_sampler_init_min_p(MIN_P, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temp),
        llama_cpp.llama_sampler_init_dist(sampling.seed),
    ]


@dataclass
class Session:
    """Messages, and the model that answers them."""

    llm: Llama
    interrupts: Interrupts
    sampling: Sampling = field(default_factory=Sampling)
    messages: list[Message] = field(default_factory=list)
    system: str = ""
    context: str = ""

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.llm, self.interrupts)
        self._vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self.llm.model)
        self._bos = self._token_text(llama_cpp.llama_vocab_bos(self._vocab))
        self._sampler = Sampler(self.sampling)
        self.template = self._load_template()

    def ask(self, text: str, n_predict: int, on_text: Callable[[str], None], on_progress: Progress) -> Turn:
        """Answers a message, which comes after what add_context() gave."""
        message = {"role": "user", "content": _join(self.context, text) if self.context else text}
        turn = self._answer([*self.messages, message], n_predict, on_text, on_progress)
        if turn.answered:
            self.messages += [message, {"role": "assistant", "content": turn.text}]
            self.context = ""
        return turn

    def regenerate(self, n_predict: int, on_text: Callable[[str], None], on_progress: Progress) -> Turn:
        """Another answer to the last message; the old one stays if there is none."""
        if not self.messages:
            raise MonarchError("nothing to answer again: write a message first")
        turn = self._answer(self.messages[:-1], n_predict, on_text, on_progress)
        if turn.answered:
            self.messages[-1] = {"role": "assistant", "content": turn.text}
        return turn

    def add_context(self, text: str) -> int:
        """Puts a text before the next message and returns how many tokens it has."""
        context = _join(self.context, text) if self.context else text
        n_tokens = len(self.tokenize(context))
        if n_tokens >= self.decoder.n_ctx:
            raise ContextFull("the text needs", n_tokens, self.decoder.n_ctx)
        self.context = context
        return n_tokens

    def clear(self) -> None:
        self.messages.clear()
        self.context = ""
        self.decoder.clear()

    def tokenize(self, text: str) -> list[int]:
        # most templates write the first token themselves
        add_bos = not (self._bos and text.startswith(self._bos))
        return self.llm.tokenize(text.encode("utf-8"), add_bos=add_bos, special=True)

    def close(self) -> None:
        self._sampler.close()

    def _answer(
        self, messages: list[Message], n_predict: int, on_text: Callable[[str], None], on_progress: Progress
    ) -> Turn:
        turn = Turn()
        try:
            tokens = self._prompt_tokens(messages)
            with self.interrupts.working():
                self._read_prompt(turn, tokens, on_progress)
                self._generate(turn, n_predict, on_text)
        except Stopped:
            turn.stopped = True
        except MonarchError as error:
            turn.error = error
        return turn

    def _prompt_tokens(self, messages: list[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        tokens = self.tokenize(self.template.render(system + messages))
        if not tokens:
            raise MonarchError("the prompt is empty: write something")
        return tokens

    def _read_prompt(self, turn: Turn, tokens: list[int], on_progress: Progress) -> None:
        start = time.perf_counter()
        turn.n_reused = self.decoder.read(tokens, on_progress)
        turn.n_prompt = len(tokens) - turn.n_reused
        turn.prompt_s = time.perf_counter() - start

    def _generate(self, turn: Turn, n_predict: int, on_text: Callable[[str], None]) -> None:
        stream = Utf8Stream()
        start = time.perf_counter()
        try:
            for token in self._tokens(n_predict):
                turn.n_answer += 1
                self._emit(turn, stream.feed(self._piece(token)), on_text)
        finally:
            self._emit(turn, stream.end(), on_text)
            turn.answer_s = time.perf_counter() - start

    def _tokens(self, n_predict: int) -> Iterator[int]:
        """n_predict -1: until the model ends its answer."""
        n = 0
        while n != n_predict:
            token = self._sampler.sample(self.llm.ctx)
            if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            n += 1
            if n != n_predict:
                self.decoder.append([token])

    def _emit(self, turn: Turn, text: str, on_text: Callable[[str], None]) -> None:
        if text:
            turn.text += text
            on_text(text)

    def _load_template(self) -> Template:
        source = self.llm.metadata.get("tokenizer.chat_template")
        if not source:
            return PlainText()
        return ChatTemplate(source, self._bos, self._token_text(llama_cpp.llama_vocab_eos(self._vocab)))

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = (ctypes.c_char * size)()
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return bytes(buffer[:n])
            size = -n


def _join(before: str, after: str) -> str:
    return before + ("" if before.endswith("\n") else "\n") + after
