"""Chat templates render as in transformers, and refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ostinato.errors import TokenizerError
from ostinato.text import ChatTemplate, Tokenizer

from .vocabularies import byte_level

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RICH = """{{- bos_token }}
{%- if tools %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% set seen = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
    {% if seen.count > 3 %}{% break %}{% endif %}
    {% set seen.count = seen.count + 1 %}
[{{ message.role }}]{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{%- if add_generation_prompt %}[assistant]{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": " Größe <b>&</b> "},
    {"role": "user", "content": "hi 🙂"},
    {"role": "tool", "content": "left out"},
    {"role": "assistant", "content": "line\nline\n"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "description": "<a & b>", "parameters": {}}}]


def _reference() -> Any:
    backend = Tokenizer.from_gguf(byte_level("smollm"))._backend
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, RICH])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": True}])
def test_as_in_transformers(template: str, tools: Any, prompt: bool, more: dict[str, Any]) -> None:
    own = ChatTemplate.from_gguf(byte_level("smollm") | {"tokenizer.chat_template": template})
    expected = _reference().apply_chat_template(
        MESSAGES, tools=tools, chat_template=template, add_generation_prompt=prompt, tokenize=False, **more
    )
    assert ChatTemplate.required(own).render(MESSAGES, tools=tools, add_generation_prompt=prompt, **more) == expected


def test_the_date() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert year.isdigit()
    assert len(year) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[5].content.strip() }}", "refuses these messages"),
        ("{{ messages + 1 }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_refusals_are_one_line(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_no_template() -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        ChatTemplate("{% if %}")
    assert ChatTemplate.from_gguf(byte_level("smollm")) is None
    with pytest.raises(TokenizerError, match="--raw"):
        ChatTemplate.required(None)


def test_places_in_a_directory(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path) is None
    config = {
        "bos_token": {"content": "<B>"},
        "eos_token": "<E>",
        "chat_template": "config{{ bos_token }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.required(ChatTemplate.from_directory(tmp_path)).render([]) == "config<B><E>"
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    named = ChatTemplate.required(ChatTemplate.from_directory(tmp_path))
    assert (named.render([]), named.render([], tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("file{{ bos_token }}")
    assert ChatTemplate.required(ChatTemplate.from_directory(tmp_path)).render([]) == "file<B>"
