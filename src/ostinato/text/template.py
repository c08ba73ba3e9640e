"""Chat templates: messages in, the prompt that a model was trained on out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ostinato.errors import TokenizerError
from ostinato.text.directory_vocabulary import read_json, read_named_tokens
from ostinato.text.gguf_vocabulary import named_tokens

# What the expressions of a template raise when messages lack what it reads; all of it is the template's answer.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class _Generation(Extension):
    """``{% generation %}`` marks answers for training; for a prompt it only encloses its text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML, which models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A model's chat template, in a sandbox: the file comes from strangers.

    source     Jinja text
    tool_use   another template, for requests with tools, where the model has one
    variables  bos_token, eos_token, …: what the template may name

    Raises TokenizerError when the text is no template.
    """

    def __init__(self, source: str, *, tool_use: str | None = None, variables: Mapping[str, str] | None = None) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._tool_use = self._template if tool_use is None else environment.from_string(tool_use)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the model's chat template cannot be read: {_one_line(error)}") from error
        self.source = source
        self._variables = dict(variables or {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """The template in a GGUF file's keys, or None if it has none."""
        source = metadata.get("tokenizer.chat_template")
        if not source:
            return None
        tool_use = metadata.get("tokenizer.chat_template.tool_use")
        return cls(str(source), tool_use=tool_use, variables=named_tokens(metadata))

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a Hugging Face directory (chat_template.jinja, or older places), or None if it has none."""
        directory = Path(path)
        source: Any = None
        for file in ("tokenizer_config.json", "chat_template.json"):
            source = read_json(directory / file).get("chat_template", source)
        tool_use = None
        if isinstance(source, list):  # several, each with its name
            by_name = {str(entry["name"]): str(entry["template"]) for entry in source}
            source, tool_use = by_name.get("default"), by_name.get("tool_use")
        file_ = directory / "chat_template.jinja"
        if file_.is_file():
            source = file_.read_text(encoding="utf-8")
            extra = directory / "additional_chat_templates" / "tool_use.jinja"
            tool_use = extra.read_text(encoding="utf-8") if extra.is_file() else None
        if not source:
            return None
        return cls(str(source), tool_use=tool_use, variables=read_named_tokens(directory))

    @staticmethod
    def required(template: ChatTemplate | None) -> ChatTemplate:
        """``template``, or the error that says what to do without one."""
        if template is None:
            raise TokenizerError("the model has no chat template; use --raw to give it the prompt as it stands")
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages`` (each with a role and a content).

        add_generation_prompt  end with the beginning of the model's turn
        tools                  JSON schemas of functions that the model may call
        variables              whatever else the template knows, such as enable_thinking

        Raises TokenizerError with the template's own words when it refuses the messages.
        """
        template = self._tool_use if tools else self._template
        try:
            return template.render(
                **{
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self._variables,
                    **variables,
                }
            )
        except _TEMPLATE_ERRORS as error:
            raise TokenizerError(f"the model's chat template refuses these messages: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
