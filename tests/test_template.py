"""Chat templates: rendered as models expect, and in a sandbox."""

import pytest

from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.template import ChatTemplate, PlainText

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

USER = [{"role": "user", "content": "hi <b> & é"}]


def render(source: str, messages=USER) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages)


def test_what_hugging_face_adds_to_jinja():
    assert render("{% generation %}{{ messages[0].role }}{% endgeneration %}!") == "user!"
    assert render("{{ 'é' | tojson(ensure_ascii=True) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}") == (
        '"\\u00e9"{"a": 2, "b": 1}'
    )
    assert render("{{ [1, 2] | tojson(separators=(',', ':')) }}{{ [1] | tojson(indent=1) }}") == "[1,2][\n 1\n]"


def test_tinyllama_template():
    messages = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hi"}]
    assert render(ZEPHYR, messages) == "<|system|>\nbe nice</s>\n<|user|>\nhi</s>\n<|assistant|>\n"


def test_what_templates_of_models_use():
    assert render("{{ bos_token }}{{ messages[0].content | tojson }}") == '<s>"hi <b> & é"'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ '-' * 3 }}{{ 2 * 3 }}") == "---6"
    assert render("{%- set ns = namespace(n=1) -%}{% set ns.n = 2 %}{{ ns.n }}") == "2"


def test_a_templates_own_refusal_is_one_line():
    with pytest.raises(MonarchError, match="refuses this conversation: System role not supported$"):
        render("{{ raise_exception('System role not supported') }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ ('%s' | attr('format')).__self__.__class__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(10000000000) %}{% endfor %}",
    ],
)
def test_attacks_are_refused(attack):
    messages = [dict(USER[0])]
    with pytest.raises(MonarchError) as refusal:
        render(attack, messages)
    assert "\n" not in str(refusal.value)
    assert messages == USER


def test_a_broken_template_is_one_line():
    with pytest.raises(MonarchError, match="chat template is broken"):
        render("{% if %}")


def test_plain_text_continues():
    messages = [
        {"role": "user", "content": "Once upon"},
        {"role": "assistant", "content": " a time"},
        {"role": "user", "content": "Then"},
    ]
    assert PlainText().render(messages) == "Once upon a time\nThen"
    assert PlainText().render(messages[:1]) == "Once upon"
