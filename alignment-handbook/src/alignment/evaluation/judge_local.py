"""Judges that need no endpoint: reward functions and reward models, on the answers of two models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignment.data.row import Row
from alignment.errors import UserError
from alignment.evaluation.files import conversation, read_answers, read_instructions, read_objects, read_questions
from alignment.resumable import write_rows
from alignment.sampling.score import Scorer, score_file


def compare_models(
    answers: list[str], questions: str | None, output_dir: str, scorers: list[Scorer], batch_size: int, dtype: str
) -> str:
    """Scores the answers of two models to the same questions.

    Args:
        answers: Two files: of MT-bench's `model_answer`, or lists of AlpacaEval's.
        questions: MT-bench's `question.jsonl`; None for AlpacaEval. A reward function is given its columns by name.
        output_dir: Folder to write in: `scored/<model>.jsonl`, a row an answer.
        scorers, batch_size, dtype: See `alignment.sampling.score.score_file`.

    Returns:
        The mean scores, and the difference of the second to the first with its paired bootstrap interval over the
        questions, for a person. The score of a question is the mean over its turns.

    Raises:
        UserError: A file is wrong, or the two have no scored question in common.
    """
    if len(answers) != 2:
        raise UserError(
            f"--answers: a reward function or model compares two models, and {len(answers)} files are given"
        )
    question_rows = None if questions is None else read_questions(questions)
    read = _alpaca_rows if question_rows is None else lambda path: _mt_bench_rows(path, question_rows)
    (one, rows_one), (two, rows_two) = map(read, answers)
    if one == two:
        raise UserError(f"--answers: both files are of {one}; answer with another --model_id")
    folder = Path(output_dir) / "scored"
    scores = [
        _score(name, rows, folder, scorers, batch_size, dtype) for name, rows in ((one, rows_one), (two, rows_two))
    ]
    both = [key for key in scores[0] if key in scores[1]]
    if not both:
        raise UserError(f"--answers: no question has a score in both {answers[0]} and {answers[1]}")
    first, second = (np.array([np.mean(of_model[key]) for key in both]) for of_model in scores)
    return _comparison(one, two, first, second)


def _comparison(one: str, two: str, first: np.ndarray, second: np.ndarray) -> str:
    # It brings torch and trl, for which the judges behind an endpoint need not wait.
    from alignment.evaluation.held_out import bootstrap_interval, verdict

    low, high = bootstrap_interval(second - first)
    lines = [(one, f"{first.mean():.3f}"), (two, f"{second.mean():.3f}")]
    lines += [
        ("difference (95 %)", f"{np.mean(second - first):+.3f} [{low:+.3f}, {high:+.3f}], {len(first)} questions")
    ]
    lines += [("verdict", verdict({"score_difference_interval": [low, high]}))]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _score(
    name: str, rows: list[Row], folder: Path, scorers: list[Scorer], batch_size: int, dtype: str
) -> dict[Any, list[float]]:
    """Scores of a model's answers by question; of those that have one."""
    answers, scored = folder / f"{name}.answers.jsonl", folder / f"{name}.jsonl"
    write_rows(answers, rows)
    score_file(str(answers), str(scored), scorers, batch_size=batch_size, dtype=dtype, overwrite=True)
    scores: dict[Any, list[float]] = {}
    for _, row in read_objects(str(scored), "scores"):
        if row["scores"][0] is not None:
            scores.setdefault(row.get("question_id", row.get("instruction")), []).append(row["scores"][0])
    return scores


def _mt_bench_rows(path: str, question_rows: dict[int, tuple[str, Row]]) -> tuple[str, list[Row]]:
    """A model's name, and a row for each turn: what the model saw, what it said, and the question's columns."""

    def rows() -> Iterator[Row]:
        for number, (_, question) in question_rows.items():
            for turn, answer in enumerate(turns[number][: len(question["turns"])]):
                prompt = conversation(question["turns"][: turn + 1], turns[number][:turn])
                yield {**question, "turn": turn + 1, "prompt": prompt, "responses": [answer]}

    model, turns = read_answers(path, question_rows)
    return model, list(rows())


def _alpaca_rows(path: str) -> tuple[str, list[Row]]:
    outputs = read_instructions(path, "output", "generator")
    rows = [
        {**row, "prompt": conversation([instruction], []), "responses": [row["output"]]}
        for instruction, (_, row) in outputs.items()
    ]
    return rows[0]["generator"], rows
