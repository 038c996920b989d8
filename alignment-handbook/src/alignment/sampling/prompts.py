"""Reads rows with a prompt, for `sample.py` and `score.py`: complete, in order, each with its location."""

from collections.abc import Iterator
from pathlib import Path

from alignment.data.formats import read_prompt
from alignment.data.row import BadRow, Row
from alignment.data.sources import open_source, read_piece
from alignment.data.texts import strings
from alignment.errors import UserError


def read_prompts(path: str) -> tuple[list[Row], list[str]]:
    """Rows of a file, their prompts as messages.

    Args:
        path: A `.txt` file with a prompt a line, or a file of rows (`.jsonl`, `.json`, `.csv`, each also `.gz`, or
            `.parquet`) with a column `prompt`: text, which is one turn of the user's, or messages.

    Returns:
        The rows, and for each its location as a user would name it. `tools` are a list and `chat_template_kwargs` an
        object where a row has them.

    Raises:
        UserError: There is no such file, a row cannot be read, or its prompt cannot be answered.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a .jsonl file, or a .txt with a prompt a line")
    rows, locations = [], []
    for location, row in _read_lines(path) if path.endswith(".txt") else _read_rows(path):
        rows.append({**row, **_prompt(row, location)})
        locations.append(location)
    if not rows:
        raise UserError(f"{path}: no rows; give a file that has some")
    return rows, locations


def _read_lines(path: str) -> Iterator[tuple[str, Row]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it") from error
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            yield f"{path}, line {i + 1}", {"prompt": line.strip()}


def _read_rows(path: str) -> Iterator[tuple[str, Row]]:
    for piece in open_source(path):
        for location, row in read_piece(piece):
            if isinstance(row, BadRow):
                raise UserError(f"{location}: {row.detail}")
            if not isinstance(row, dict) or row.get("prompt") is None:
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{location}: needs a column prompt; found {found or 'none'}")
            yield location, row


def _prompt(row: Row, location: str) -> Row:
    """The prompt, and what the chat template is given beside it."""
    try:
        found = {name: value for name, value in read_prompt(row).items() if value is not None or name in row}
    except BadRow as bad:
        raise UserError(f"{location}: {bad.detail}") from bad
    last = found["prompt"][-1] if found["prompt"] else {"role": "assistant"}
    if last["role"] == "assistant" or not (last["content"].strip() or last["role"] == "tool"):
        raise UserError(f"{location}: the prompt must end with a user's turn that says something, or a tool's")
    try:
        "".join(strings([*found.values()])).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: holds half of a surrogate pair, which is no character: fix the row") from error
    return found
