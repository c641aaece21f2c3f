"""The chat template that a model carries, rendered in a sandbox: a GGUF is somebody else's code."""

from __future__ import annotations

import datetime
import json
from typing import Any, Protocol

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import MonarchError

Message = dict[str, str]

# far above any honest template's text, far below what hurts
MAX_REPEAT = 1 << 20


class Template(Protocol):
    def render(self, messages: list[Message]) -> str:
        """The text of the conversation up to where the answer begins."""


class _Environment(ImmutableSandboxedEnvironment):
    # 'a' * 10**10 and 9 ** 9 ** 9 pass the stock sandbox
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or _is_huge(left, right) or _is_huge(right, left):
            raise SecurityError(f"the operation {operator} on values this large is not allowed")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja would print it as nothing
        raise SecurityError(f"access to {attribute} of {type(obj).__name__} is not allowed")


def _is_huge(sequence: Any, count: Any) -> bool:
    return hasattr(sequence, "__len__") and isinstance(count, int) and len(sequence) * count > MAX_REPEAT


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, by which training finds the answers: what is inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_EXTENSIONS = ["jinja2.ext.loopcontrols", _GenerationTag]


class ChatTemplate:
    """tokenizer.chat_template of a GGUF."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._variables = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise MonarchError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: list[Message]) -> str:
        try:
            return self._template.render(messages=messages, **self._variables)
        except SecurityError as error:
            raise MonarchError(f"the model's chat template was refused as unsafe: {error}") from error
        except Exception as error:  # a template is a program: anything may go wrong in it
            reason = " ".join(str(error).split())
            raise MonarchError(f"the model's chat template refuses this conversation: {reason}") from error


class PlainText:
    """For a model without a template: it continues the text."""

    def render(self, messages: list[Message]) -> str:
        text = ""
        for message in messages:
            # an answer follows its prompt directly, as the model wrote it
            glue = "\n" if text and message["role"] != "assistant" and not text.endswith("\n") else ""
            text += glue + message["content"]
        return text
