"""MT-bench's single-answer grading: each turn gets a rating from 1 to 10, in FastChat's file."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alignment.data.row import Row
from alignment.errors import UserError
from alignment.evaluation.endpoint import EndpointConfig
from alignment.evaluation.files import read_answers, read_objects, read_questions
from alignment.evaluation.judge import (
    VerdictSettings,
    after_thinking,
    chat_request,
    file_name,
    fill,
    open_judge,
    outcome,
)
from alignment.resumable import Entry, write_rows

#: Categories whose judge is shown a reference answer, as FastChat has it.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

_NUMBER = r"\s*(\d+(?:[.,]\d+)?)\s*(?:/\s*10\s*)?"
#: FastChat's form, and the one it falls back to; which may be a citation too, unless it is all that a line says.
_RATINGS = (
    re.compile(rf"\[\[{_NUMBER}\]\]"),
    re.compile(rf"(?:^\W*|\brating\b[^\[\]\d\n]*)\[{_NUMBER}\]\W*$", re.IGNORECASE | re.MULTILINE),
)


def grade_mt_bench(
    questions: str,
    answers: list[str],
    prompts: str,
    references: str | None,
    output_dir: str,
    config: EndpointConfig,
    settings: VerdictSettings,
) -> str:
    """Grades both turns of each answer, and writes `model_judgment/<judge>_single.jsonl`.

    Args:
        questions: FastChat's `question.jsonl`.
        answers: Files of `model_answer`.
        prompts: FastChat's `judge_prompts.jsonl`.
        references: File of `reference_answer`; may be None without questions of `REFERENCE_CATEGORIES`.
        output_dir: Folder to write in. Verdicts on other models and questions stay in the file.
        config: The judge.
        settings: Length and temperature of a verdict.

    Returns:
        Means by turn and by category, and what is left to ask, for a person.

    Raises:
        UserError: A file is wrong, or verdicts are missing for another reason than the budget.
    """
    question_rows = read_questions(questions)
    turns_by_model = dict(read_answers(path, question_rows) for path in answers)
    if len(turns_by_model) < len(answers):
        raise UserError("--answers: two files are of one model; give each model's file once")
    with_reference = {
        n: question_rows[n] for n in question_rows if question_rows[n][1]["category"] in REFERENCE_CATEGORIES
    }
    if with_reference and references is None:
        raise UserError(
            f"--references: needed for the {len(with_reference)} questions of {', '.join(REFERENCE_CATEGORIES)}"
        )
    references_shown = read_answers(references, with_reference)[1] if with_reference else {}
    templates = {row["name"]: row for _, row in read_objects(prompts, "name", "system_prompt", "prompt_template")}
    rows, requests = [], []
    for model, turns in turns_by_model.items():
        for number, turn, name, texts in _grading(question_rows, turns, references_shown):
            if name not in templates:
                raise UserError(f"{prompts}: no prompt named {name}; give FastChat's judge_prompts.jsonl")
            text = fill(templates[name]["prompt_template"], texts, f"{prompts}, {name}")
            judge = [config.model, name]
            rows.append({"question_id": number, "model": model, "judge": judge, "user_prompt": text, "turn": turn})
            turns_of_judge = [("system", templates[name]["system_prompt"]), ("user", text)]
            requests.append(chat_request(turns_of_judge, settings))
    output = Path(output_dir) / "model_judgment" / f"{file_name(config.model)}_single.jsonl"
    with open_judge(output_dir, config) as judge:
        replies = judge.ask(requests, "Grading")
        judged = [_graded(row, reply) for row, reply in zip(rows, replies, strict=True) if reply is not None]
        is_there = output.exists() and output.stat().st_size > 0
        old = [row for _, row in read_objects(str(output), "model", "question_id")] if is_there else []
        others = [row for row in old if row["model"] not in turns_by_model or row["question_id"] not in question_rows]
        write_rows(output, others + judged)
    table = ratings_table(judged, {number: row["category"] for number, (_, row) in question_rows.items()})
    return outcome(judge, f"{output}\n{table}", len(judged), len(rows))


def rating_of(text: str) -> int | float:
    """The rating in a judgment: the last one after any thinking, from 1 to 10; -1 without one.

    Example:
        >>> rating_of("Good, but short. Rating: [[7]]"), rating_of("[8.5]"), rating_of("Ten out of ten.")
        (7, 8.5, -1)
        >>> rating_of("<think>[[3]]?</think> From [[1]] to [[10]], I say [[6]]."), rating_of("[[85]]")
        (6, -1)
    """
    said = after_thinking(text)
    found = next(filter(None, (pattern.findall(said) for pattern in _RATINGS)), ["0"])
    number = float(found[-1].replace(",", "."))
    if not 1 <= number <= 10:
        return -1
    return int(number) if number.is_integer() else number


def ratings_table(judged: list[Row], categories: dict[int, str]) -> str:
    """Mean ratings by turn and by category, a column a model; what has no rating (-1) is left out, and counted."""
    models = list(dict.fromkeys(row["model"] for row in judged))
    parts = {"turn 1": lambda row: row["turn"] == 1, "turn 2": lambda row: row["turn"] == 2, "mean": lambda row: True}
    parts |= {
        name: lambda row, name=name: categories[row["question_id"]] == name for name in sorted(set(categories.values()))
    }
    lines = [["", *models]]
    for name, belongs in parts.items():
        cells = [[r["score"] for r in judged if r["model"] == m and r["score"] != -1 and belongs(r)] for m in models]
        lines.append([name, *(f"{np.mean(scores):.2f}" if scores else "-" for scores in cells)])
    lines.append(["no rating", *(str(sum(r["score"] == -1 for r in judged if r["model"] == m)) for m in models)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _grading(
    question_rows: dict[int, tuple[str, Row]], answers: dict[int, list[str]], references: dict[int, list[str]]
) -> Iterator[tuple[int, int, str, dict[str, str]]]:
    """The gradings of a model: question, turn, and name and texts of the judge's prompt, as in FastChat."""
    for number, (_, question) in sorted(question_rows.items()):
        named = {"question": question["turns"], "answer": answers[number]}
        if number in references:
            named["ref_answer"] = references[number]
        name = "single-math-v1" if number in references else "single-v1"
        first = {key: texts[0] for key, texts in named.items() if key != "ref_answer"}
        yield number, 1, name, first | ({"ref_answer_1": named["ref_answer"][0]} if number in references else {})
        if len(question["turns"]) == 2:
            both = {f"{key}_{i + 1}": texts[i] for key, texts in named.items() for i in (0, 1)}
            yield number, 2, f"{name}-multi-turn", both


def _graded(row: Row, reply: Entry) -> Row:
    return {
        **{name: row[name] for name in ("question_id", "model", "judge", "user_prompt")},
        "judgment": reply["text"],
        "score": rating_of(reply["text"]),
        "turn": row["turn"],
        "tstamp": reply["tstamp"],
    }
