"""Reads the files of MT-bench and AlpacaEval row by row; an error names the row."""

import json
from pathlib import Path
from typing import Any

from alignment.data.row import BadRow, Messages, Row
from alignment.data.sources import open_source, read_piece
from alignment.errors import UserError


def read_objects(path: str, *columns: str) -> list[tuple[str, Row]]:
    """Rows of a JSON or JSON-lines file (also `.gz`), each behind its location as a user would name it.

    Args:
        path: The file.
        columns: Columns that each row must have.

    Raises:
        UserError: There is no such file, it has no rows, or a row cannot be read or lacks a column.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; check the path")
    rows = []
    for piece in open_source(path):
        for location, row in read_piece(piece):
            if isinstance(row, BadRow):
                raise UserError(f"{location}: {row.detail}")
            missing = [name for name in columns if not isinstance(row, dict) or row.get(name) is None]
            if missing:
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{location}: lacks {', '.join(missing)}; it has {found or 'nothing'}")
            _check_text(row, location)
            rows.append((location, row))
    if not rows:
        raise UserError(f"{path}: no rows; give a file that has some")
    return rows


def read_questions(path: str) -> dict[int, tuple[str, Row]]:
    """MT-bench's questions by `question_id`: `category`, `turns` (the user's, one or more).

    Raises:
        UserError: See `read_objects`; an id is no whole number or occurs twice, or a turn is no text.
    """
    questions: dict[int, tuple[str, Row]] = {}
    for location, row in read_objects(path, "question_id", "category", "turns"):
        _add(questions, row["question_id"], location, row)
        _check_turns(row["turns"], f"{location}: turns")
    return questions


def read_answers(path: str, questions: dict[int, tuple[str, Row]]) -> tuple[str, dict[int, list[str]]]:
    """A file of `model_answer` or `reference_answer`.

    Args:
        path: The file, one line a question.
        questions: What it answers, from `read_questions`, or a part of that; answers to other questions are left out.

    Returns:
        The model's id, and its turns by `question_id`.

    Raises:
        UserError: See `read_objects`; a question has no answer, two, or too few turns, or there are two models.
    """
    answers: dict[int, tuple[str, Row]] = {}
    for location, row in read_objects(path, "question_id", "model_id", "choices"):
        if row["question_id"] in questions:
            _add(answers, row["question_id"], location, row)
    if missing := sorted(questions.keys() - answers.keys()):
        raise UserError(f"{path}: no answer to {len(missing)} of {len(questions)} questions, the first {missing[0]}")
    turns = {}
    for number, (location, row) in answers.items():
        choice = row["choices"][0] if isinstance(row["choices"], list) and row["choices"] else None
        turns[number] = choice.get("turns") if isinstance(choice, dict) else None
        _check_turns(turns[number], f"{location}: choices[0].turns", len(questions[number][1]["turns"]))
    models = {row["model_id"] for _, row in answers.values()}
    if len(models) > 1:
        raise UserError(f"{path}: answers of {' and '.join(sorted(map(str, models)))}; give a file of one model")
    return str(models.pop()), turns


def read_instructions(path: str, *columns: str) -> dict[str, tuple[str, Row]]:
    """AlpacaEval's rows by `instruction`, by which files are matched.

    Args:
        path: A JSON list, or JSON lines.
        columns: Further columns that must be there, as texts: `output`, `generator` of a model's outputs.

    Raises:
        UserError: See `read_objects`; a column is no text, or an instruction is empty or occurs twice.
    """
    rows: dict[str, tuple[str, Row]] = {}
    for location, row in read_objects(path, "instruction", *columns):
        for name in ("instruction", *columns):
            if not isinstance(row[name], str):
                raise UserError(f"{location}: {name} is no text; fix the row")
        if not row["instruction"].strip() or row["instruction"] in rows:
            twice = "stands in an earlier row too" if row["instruction"] in rows else "is empty"
            raise UserError(f"{location}: the instruction {twice}; remove the row")
        rows[row["instruction"]] = location, row
    return rows


def conversation(questions: list[str], answers: list[str]) -> Messages:
    """The user's turns with the answers between them, up to the first that has none.

    Example:
        >>> [turn["content"] for turn in conversation(["Name a prime.", "Another."], ["7"])]
        ['Name a prime.', '7', 'Another.']
    """
    messages = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


def _add(rows: dict[int, tuple[str, Row]], number: Any, location: str, row: Row) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number in rows:
        what = "stands in an earlier row too" if number in rows else "is no whole number"
        raise UserError(f"{location}: question_id {number!r} {what}; fix or remove the row")
    rows[number] = location, row


def _check_turns(turns: Any, location: str, min_turns: int = 1) -> None:
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns) or len(turns) < min_turns:
        raise UserError(f"{location} must be a list of {min_turns} texts or more; fix the row")


def _check_text(row: Row, location: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: holds half of a surrogate pair, which is no character: fix the row") from error
