"""The chat template of a run: the key `chat_template`, and in it the defaults of the key `chat_template_kwargs`.

The defaults are written into the template itself, which is saved with the model: training, sampling, evaluation, chat,
vLLM and everybody else render alike. What a row or a request says itself counts more.
"""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from alignment.errors import UserError
from trl_nca.rendering.messages import RefusedRow, read_template_kwargs

#: What a Jinja template has in it.
_JINJA = re.compile("{[{%]")


def read_template(given: str) -> str:
    """A chat template, from the key `chat_template`: a file's name, or the template itself.

    Raises:
        UserError: It is neither, or the file cannot be read as one.
    """
    if _JINJA.search(given):
        return given
    try:
        template = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"no such file {given}" if isinstance(error, FileNotFoundError) else f"{given} is no file of text"
        fix = "give one of these, or leave the key out for the tokenizer's own template"
        raise UserError(
            f"chat_template: {reason}, and a Jinja template has {{{{ }}}} or {{% %}} in it; {fix}"
        ) from error
    if not _JINJA.search(template):
        raise UserError(f"chat_template: {given} holds no Jinja template: no {{{{ }}}} or {{% %}} is in it")
    return template


def read_kwargs(given: Any) -> dict[str, Any] | None:
    """The key `chat_template_kwargs`: a mapping, or as a flag has it JSON text; None where it is not given.

    Raises:
        ValueError: It is something else, or has a name that no template can read or a value that is no JSON.
    """
    if given is None or given == "":
        return None
    try:
        kwargs = read_template_kwargs(given)
    except RefusedRow as refused:
        raise ValueError(refused.detail) from None
    for name, value in kwargs.items():
        try:
            Environment().parse(_default(name, value))
        except (TemplateSyntaxError, TypeError, ValueError):
            fix = "give names of the template's variables and JSON's values, as in {enable_thinking: false}"
            raise ValueError(f"chat_template_kwargs: {name!r}: {value!r} cannot be set; {fix}") from None
    return kwargs or None


def with_defaults(template: str | dict[str, str] | None, kwargs: dict[str, Any]) -> str | dict[str, str]:
    """A template that takes its arguments from here where nobody gives them.

    Raises:
        UserError: There is no template, or it reads no argument of that name.

    Example:
        >>> print(with_defaults("{{ 'fast' if quick }}", {"quick": True}))
        {%- if quick is not defined %}{%- set quick = true %}{%- endif %}
        {{ 'fast' if quick }}
    """
    if isinstance(template, dict):  # one for rows with tools, and one for others
        return {name: str(with_defaults(each, kwargs)) for name, each in template.items()}
    for name in kwargs:
        if not re.search(rf"\b{name}\b", template or ""):
            reads = f"reads no {name}" if template else "is missing"
            raise UserError(f"chat_template_kwargs: the chat template {reads}; leave the key out, or set chat_template")
    # The line end is part of the last tag (`trim_blocks`), so that the template begins as it did.
    defaults = "".join(_default(name, value) for name, value in kwargs.items()) + "\n"
    return str(template) if str(template).startswith(defaults) else defaults + str(template)


def _default(name: str, value: Any) -> str:
    if not name.isidentifier():
        raise ValueError(name)
    return f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"


def _literal(value: Any) -> str:
    """A value of JSON in Jinja's language."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
