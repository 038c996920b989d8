"""Ollama's Modelfile of a saved model: its chat template in Ollama's language, and the tokens to stop at.

Ollama reads no Jinja: a GGUF file's chat template it compares with those it knows, and takes none if it knows none.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from alignment.data.row import Messages
from trl_nca.rendering.messages import RefusedRow
from trl_nca.rendering.renderer import Renderer
from trl_nca.stops import stop_tokens

#: The GGUF file that the Modelfile is for, seen from it.
GGUF = "model.gguf"
#: The roles of conversations that a translation must say as the chat template does.
_CONVERSATIONS = ("u", "su", "uau", "suau", "uauau", "suauau")
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


class Translation(NamedTuple):
    """What a chat template writes around the texts of a conversation.

    Attributes:
        before_user: Before the first user's text, where there is no system's.
        before_system: Before a system's text; None where the template takes none.
        after_system: Between a system's text and the first user's.
        before_answer: Between a user's text and the answer.
        before_next: Between an answer and the next user's text.
        to_answer: Behind the last user's text, for the model to go on from.
    """

    before_user: str
    before_system: str | None
    after_system: str
    before_answer: str
    before_next: str
    to_answer: str

    def render(self, messages: Messages) -> str:
        """What Ollama makes of messages that end with a user's, by the template of `as_go`."""
        roles, texts = [m["role"] for m in messages], [str(m["content"]) for m in messages]
        between = {
            ("system", "user"): self.after_system,
            ("user", "assistant"): self.before_answer,
            ("assistant", "user"): self.before_next,
        }
        begin = self.before_system if roles[0] == "system" else self.before_user
        steps = [between[pair] + text for pair, text in zip(pairwise(roles), texts[1:], strict=True)]
        return f"{begin}{texts[0]}{''.join(steps)}{self.to_answer}"

    def as_go(self) -> str:
        """The template in the language of Go's text/template, as Ollama fills it in."""
        begin = _escape(self.before_user)
        if self.before_system is not None:
            system = f"{_escape(self.before_system)}{{{{ $.System }}}}{_escape(self.after_system)}"
            begin = f"{{{{ if $.System }}}}{system}{{{{ else }}}}{begin}{{{{ end }}}}"
        return (
            '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $first }}'
            f"{begin}{{{{ else }}}}{_escape(self.before_next)}{{{{ end }}}}"
            '{{ $first = false }}{{ .Content }}{{ else if eq .Role "assistant" }}'
            f"{_escape(self.before_answer)}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}{_escape(self.to_answer)}"
        )


def write_modelfile(folder: str | Path) -> Path:
    """Writes `Modelfile` into a saved model's folder, for a GGUF file beside it.

    Args:
        folder: Of a merged or fully trained model, with its tokenizer.

    Returns:
        The file.
    """
    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    file = folder / "Modelfile"
    file.write_text(modelfile(tokenizer, stop_tokens(tokenizer, generation)), encoding="utf-8")
    return file


def modelfile(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> str:
    """The text of a Modelfile.

    Args:
        tokenizer: With the chat template; without one the model goes on from a prompt as it is.
        stops: Ids of the tokens to stop at.
    """
    translation = translate(tokenizer) if tokenizer.chat_template else None
    lines = [
        "# ollama create NAME -f Modelfile",
        "# `FROM .` takes the safetensors in this folder, of the families that Ollama converts itself.",
        f"FROM ./{GGUF}",
    ]
    if translation is not None:
        lines.append(f'TEMPLATE """{translation.as_go()}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template cannot be said in Ollama's language: write a TEMPLATE, or use llama.cpp.")
    else:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    lines += [f"PARAMETER stop {_quote(tokenizer.decode([token]))}" for token in stops]
    return "\n".join(lines) + "\n"


def translate(tokenizer: PreTrainedTokenizerBase) -> Translation | None:
    """Takes a chat template apart; None where it is no sequence of fixed texts between those of the turns.

    The BOS that the tokenizer adds by itself is left out: Ollama adds it too.
    """
    renderer = Renderer(tokenizer)
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token if tokenizer.bos_token and ids[:1] == [tokenizer.bos_token_id] else ""

    def rendered(roles: str) -> tuple[Messages, str]:
        messages = [{"role": _ROLES[role], "content": f"TURN{i}END"} for i, role in enumerate(roles)]
        return messages, renderer.render(messages, add_generation_prompt=True).removeprefix(bos)

    try:
        messages, text = rendered("uau")
        parts = _around(text, messages)
        alone, whole = rendered("u")
        begin = _around(whole, alone)
    except RefusedRow:
        return None
    try:
        system = _around(*reversed(rendered("su")))
    except RefusedRow:
        system = None
    if parts is None or begin is None:
        return None
    found = Translation(
        before_user=begin[0],
        before_system=system[0] if system else None,
        after_system=system[1] if system else "",
        before_answer=parts[1],
        before_next=parts[2],
        to_answer=begin[-1],
    )
    checked = [roles for roles in _CONVERSATIONS if system or "s" not in roles]
    is_same = all(found.render(messages) == text for messages, text in map(rendered, checked))
    return found if is_same and '"""' not in "".join(part or "" for part in found) else None


def _around(text: str, messages: Messages) -> list[str] | None:
    """What stands before, between and behind the texts of messages, which follow each other once; else None."""
    parts, rest = [], text
    for message in messages:
        before, found, rest = rest.partition(str(message["content"]))
        if not found:
            return None
        parts.append(before)
    return [*parts, rest]


def _escape(text: str) -> str:
    """Text as Go's template language takes it to mean itself.

    Example:
        >>> _escape("<a>{{b}}")
        '<a>{{ "{{" }}b}}'
    """
    return text.replace("{{", '{{ "{{" }}')


def _quote(text: str) -> str:
    return f'"{text}"' if '"' not in text else f'"""{text}"""'
