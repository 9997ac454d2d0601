"""Chat templates render as in transformers, and nothing a template does gets out of its sandbox."""

from __future__ import annotations

import time

import pytest
from transformers import AutoTokenizer

from fewbit.errors import CheckpointError, RequestError
from fewbit.text import ChatTemplate, Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '  Grüße, <b>you</b> & "me"\n'},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Count: 一二三"},
]
CHATML = (
    "{% for m in messages %}\n    {{ '<|im_start|>' + m.role + '\\n' + m['content'] | trim + eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system is not false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- set ns = namespace(n=0) -%}{%- if tools is none and documents is none %}[none]{% endif -%}"
    "{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- if ns.n > 3 %}{% break %}{% endif -%}"
    "{{ m | tojson }}{{ m | tojson(indent=2) }}{{ pad_token is defined }}{{ extra }}\n{%- endfor -%}"
    "{{ strftime_now('%Y') }}"
)


@pytest.mark.parametrize("source", [CHATML, LLAMA2, TOOLS])
@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("place", ["config", "file", "named"])
def test_equals_transformers(write_dir, source, opens, place):
    template = (
        [{"name": "default", "template": source}, {"name": "x", "template": "no"}] if place == "named" else source
    )
    directory = write_dir("byte_level", {} if place == "file" else {"chat_template": template})
    if place == "file":
        (directory / "chat_template.jinja").write_text(source)
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    text = ours.chat_template.render(MESSAGES, add_generation_prompt=opens, extra="e")
    asked = {"add_generation_prompt": opens, "extra": "e"}
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, **asked)
    ids = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **asked)
    assert ours.encode(text, add_special_tokens=False) == ids


def test_the_file_wins_over_the_config(write_dir):
    directory = write_dir("byte_level", {"chat_template": "config"})
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(directory).chat_template.render([]) == "file"


def test_a_template_that_does_not_compile():
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('only user turns') }}", "only user turns"),
        ("{{ messages[9].content }}", "undefined|has no element"),
        ("{{ 1 + messages }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe|undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurs"),
        ("{{ 'a' * 1000000000 }}", "repetition"),
        ("{{ 9 ** 999999 }}", "too large"),
        ("{% include 'x' %}", "loader"),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "more than"),
    ],
)
def test_what_a_template_may_not_do(source, why):
    with pytest.raises(RequestError, match=why) as e:
        ChatTemplate(source).render(MESSAGES)
    assert e.value.param == "messages"


def test_a_template_that_never_ends_is_given_up():
    template = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    start = time.monotonic()
    with pytest.raises(RequestError, match="too long"):
        template.render(MESSAGES, limit_s=0.2)
    assert time.monotonic() - start < 30
    assert ChatTemplate("fine").render(MESSAGES) == "fine"  # the clock is not left running


def test_messages_are_not_changed():
    message = {"role": "user", "content": "x"}
    ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render([message])
    assert message == {"role": "user", "content": "x"}
