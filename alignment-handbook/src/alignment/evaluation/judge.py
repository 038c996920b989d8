"""Shared by the judges behind an endpoint: filling prompts, opening the saved replies, and the closing summary."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alignment.errors import UserError
from alignment.evaluation.endpoint import Endpoint, EndpointConfig
from alignment.resumable import Entry, PartFile

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
#: Tags around a model's thinking, in the families' spellings: the last that ends, and one that does not.
_THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_THINKING_ENDS = re.compile(rf"(?s:.*)(?:</{_THOUGHT}>|\[/THINK\]|◁/think▷)", re.IGNORECASE)
_THINKING_STARTS = re.compile(rf"(?s:<{_THOUGHT}>|\[THINK\]|◁think▷).*", re.IGNORECASE | re.DOTALL)


class VerdictSettings(NamedTuple):
    """What a request asks of the judge. They are part of the request, so that others never share a saved reply.

    Attributes:
        max_tokens: Longest verdict, with the thinking before it.
        max_tokens_key: "max_tokens", or "max_completion_tokens", which newer endpoints want.
        temperature: None sends none, for endpoints that refuse to be told.
        logprobs: Whether to ask for the probabilities of the last token, where they are of use.
    """

    max_tokens: int
    max_tokens_key: str = "max_tokens"
    temperature: float | None = 0
    logprobs: bool = True


@contextlib.contextmanager
def open_judge(output_dir: str, config: EndpointConfig) -> Iterator[Endpoint]:
    """Opens the judge with all its earlier replies in this folder, `verdicts/<judge>.jsonl.part`.

    Raises:
        UserError: Another run uses them: each would overwrite what the other adds.
    """
    folder = Path(output_dir) / "verdicts"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir: another judge is at work in {output_dir}; wait for it") from None
        yield Endpoint(config, PartFile(str(folder / f"{file_name(config.model)}.jsonl"), {"judge": config.model}))
    finally:
        os.close(handle)


def fill(template: str, texts: dict[str, str], location: str | None = None) -> str:
    """A template with texts in place of `{name}`; braces around anything else stay, also in the texts.

    Raises:
        UserError: With `where`: the template has no place for one of the texts.

    Example:
        >>> fill('{"output": {answer}, "format": {json}}', {"answer": "{answer}"})
        '{"output": {answer}, "format": {json}}'
    """
    missing = set(texts) - set(_PLACEHOLDER.findall(template))
    if missing and location:
        raise UserError(f"{location}: the prompt has no {{{sorted(missing)[0]}}}; give one that has")
    return _PLACEHOLDER.sub(lambda m: texts.get(m[1], m[0]), template)


def chat_request(turns: list[tuple[str, str]], settings: VerdictSettings) -> Entry:
    """A chat completion of turns (role, text)."""
    messages = [{"role": role, "content": text} for role, text in turns]
    temperature = {} if settings.temperature is None else {"temperature": settings.temperature}
    return {"messages": messages, **temperature, settings.max_tokens_key: settings.max_tokens}


def after_thinking(text: str) -> str:
    """What a reply says after its thinking; nothing, where it never stops to think.

    Example:
        >>> after_thinking("<think>Is it [[3]]?</think> [[8]]"), after_thinking("so [[3]]? </think>[[8]]")
        (' [[8]]', '[[8]]')
        >>> after_thinking("<think>Is it [[3]]? Or")
        ''
    """
    return _THINKING_STARTS.sub("", _THINKING_ENDS.sub("", text, count=1))


def outcome(judge: Endpoint, summary: str, num_judged: int, num_rows: int) -> str:
    """The last lines of a run: `summary`, its cost, and how many verdicts an exhausted budget has left open.

    Raises:
        UserError: Verdicts are missing for another reason than the budget; `summary` is printed before.
    """
    summary += f"\n{judge.calls} calls and {judge.cost} tokens in this run"
    left = num_rows - num_judged
    if left and judge.failure:
        print(summary)
        raise UserError(
            f"{left} of {num_rows} verdicts are missing ({judge.failure}); those that came are saved; run the "
            "same command again to get the rest"
        )
    if left:
        summary += f"\nSTOPPED: {judge.stopped}; {left} of {num_rows} verdicts are left; run the same command again"
    return summary


def file_name(model: str) -> str:
    """A model's name as that of a file."""
    return model.replace("/", "_")
