"""Answers MT-bench's questions and AlpacaEval's instructions, in the files that their evaluators read.

A model sees prompts as in training: both go through the tokenizer's chat template. All first turns are
answered, then all second turns, each of which sees the answer to the first.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from alignment.data.row import Row
from alignment.errors import UserError
from alignment.evaluation.files import conversation, read_instructions, read_questions
from alignment.models import load_trained_model, load_trained_tokenizer
from alignment.resumable import Entry, PartFile, content_hash, fingerprint
from alignment.sampling.sample import SamplingConfig, encode_row, sample_batch

#: FastChat's, by category; `OTHER_TEMPERATURE` for any other.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7


class Task(NamedTuple):
    """A question: its location in the file, the user's turns, and the temperature of the answers."""

    location: str
    turns: list[str]
    temperature: float


@dataclass(frozen=True)
class Answer:
    """A model's turns on a task, and the time of the last, in seconds since 1970."""

    turns: list[str]
    tstamp: float


def answer_mt_bench(
    questions: str,
    model: str,
    output: str,
    model_id: str,
    config: SamplingConfig,
    dtype: str,
    overwrite: bool,
    base: str | None = None,
) -> str:
    """Writes FastChat's file of a model's answers: a line a question, sorted by `question_id`.

    Args:
        questions: FastChat's `question.jsonl`.
        model: Folder or Hub id; an adapter's folder too.
        output: A `.jsonl`; FastChat looks for `model_answer/<model_id>.jsonl`.
        model_id: Name of the model in the file.
        config: How answers are sampled; the temperature is the category's.
        dtype: Type of the weights, "auto" as they were saved.
        overwrite: Replace `output`.
        base: The base of an adapter, in place of the one that it names.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: See `read_questions`, `PartFile`, `load_trained_tokenizer` and `_check_room`.
    """
    rows = sorted(read_questions(questions).items())
    tasks = [
        Task(location, row["turns"], TEMPERATURES.get(row["category"], OTHER_TEMPERATURE))
        for _, (location, row) in rows
    ]
    _check_suffix(output, ".jsonl")
    part = _part_file(output, tasks, model, model_id, config, dtype, overwrite)

    def lines() -> Iterator[Row]:
        for (number, _), answer in zip(rows, _answers(part, tasks), strict=True):
            yield {
                "question_id": number,
                "answer_id": content_hash([model_id, number, answer.turns]),
                "model_id": model_id,
                "choices": [{"index": 0, "turns": answer.turns}],
                "tstamp": answer.tstamp,
            }

    _answer(part, tasks, model, base, config, dtype)
    return _finish(part, lines())


def answer_alpaca_eval(
    instructions: str,
    model: str,
    output: str,
    model_id: str,
    config: SamplingConfig,
    dtype: str,
    overwrite: bool,
    base: str | None = None,
) -> str:
    """Writes AlpacaEval's list of a model's outputs, in the order of the instructions.

    Args:
        instructions: Rows of `instruction` and, if known, `dataset`.
        model, model_id, dtype, overwrite, base: See `answer_mt_bench`.
        output: A `.json`.
        config: How answers are sampled.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: See `read_instructions`, `PartFile`, `load_trained_tokenizer` and `_check_room`.
    """
    rows = read_instructions(instructions)
    tasks = [Task(location, [instruction], config.temperature) for instruction, (location, _) in rows.items()]
    _check_suffix(output, ".json")
    part = _part_file(output, tasks, model, model_id, config, dtype, overwrite)
    _answer(part, tasks, model, base, config, dtype)
    return _finish(
        part,
        (
            {
                "instruction": instruction,
                "output": answer.turns[0],
                "generator": model_id,
                "dataset": row.get("dataset", Path(instructions).stem),
            }
            for (instruction, (_, row)), answer in zip(rows.items(), _answers(part, tasks), strict=True)
        ),
    )


def _answer(part: PartFile, tasks: list[Task], name: str, base: str | None, config: SamplingConfig, dtype: str) -> None:
    """Samples the batches that `part` lacks; batch i, counted over all turns, has the seed `seed + i`."""
    tokenizer, max_positions = load_trained_tokenizer(name, base)
    _check_room(tasks, tokenizer, max_positions, name, config.max_new_tokens)
    load_model = functools.cache(lambda: load_trained_model(name, dtype, base))  # not where all is done
    done = {entry["batch"]: entry["samples"] for entry in part.entries}
    answers: list[list[str]] = [[] for _ in tasks]
    num_turns = sum(len(task.turns) for task in tasks)
    num_done = sum(map(len, done.values()))
    first = 0
    with tqdm(total=num_turns, initial=num_done, desc=f"Answers of {name}", unit="turn") as progress:
        for turn in range(max(len(task.turns) for task in tasks)):
            ids = {
                i: encode_row(tokenizer, {"prompt": conversation(task.turns, answers[i])}, task.location)
                for i, task in enumerate(tasks)
                if turn < len(task.turns)
            }
            batches = _batches(ids, tasks, config)
            for index, batch in enumerate(batches, start=first):
                if index not in done:
                    drawn = replace(config, temperature=tasks[batch[0]].temperature)
                    samples = sample_batch([ids[i] for i in batch], index, load_model(), tokenizer, drawn)
                    done[index] = [[text.strip(), finished] for ((text, finished),) in samples]
                    part.add({"batch": index, "rows": batch, "samples": done[index], "tstamp": time.time()})
                    progress.update(len(batch))
                for i, (text, _) in zip(batch, done[index], strict=True):
                    answers[i].append(text)
            first += len(batches)


def _batches(ids: dict[int, list[int]], tasks: list[Task], config: SamplingConfig) -> list[list[int]]:
    """Batches of tasks with one temperature each, cut by `SamplingConfig.batches`."""
    batches = []
    for temperature in sorted({tasks[i].temperature for i in ids}):
        alike = [i for i in ids if tasks[i].temperature == temperature]
        batches += [[alike[k] for k in batch] for batch in config.batches([ids[i] for i in alike])]
    return batches


def _check_room(tasks: list[Task], tokenizer, max_positions: int | None, name: str, max_new_tokens: int) -> None:
    """Checks before the first answer that all turns and answers of a task fit into the model's context.

    Raises:
        UserError: The turns of a task and its answers may be more tokens than the model can read.
    """
    for task in tasks:
        turns = len(task.turns)
        length = len(encode_row(tokenizer, {"prompt": conversation(task.turns, [""] * (turns - 1))}, task.location))
        if max_positions is not None and length + turns * max_new_tokens > max_positions:
            fits = (max_positions - length) // turns
            fix = f"--max_new_tokens {fits} fits" if fits > 0 else "remove the row"
            raise UserError(
                f"{task.location}: {length} tokens, and {turns} x {max_new_tokens} of answers, are more than the "
                f"{max_positions} of {name}; {fix}"
            )


def _part_file(
    output: str, tasks: list[Task], name: str, model_id: str, config: SamplingConfig, dtype: str, overwrite: bool
) -> PartFile:
    header = {"tasks": content_hash([task[1:] for task in tasks]), "model": [name, fingerprint(name)]}
    return PartFile(output, header | {"model_id": model_id, "dtype": dtype} | asdict(config), overwrite)


def _check_suffix(output: str, suffix: str) -> None:
    if Path(output).suffix != suffix:
        raise UserError(f"--output: {output}: its evaluator reads a {suffix} file; name one")


def _answers(part: PartFile, tasks: list[Task]) -> Iterator[Answer]:
    entries: list[list[Entry]] = [[] for _ in tasks]
    texts: list[list[str]] = [[] for _ in tasks]
    for entry in sorted(part.entries, key=lambda entry: entry["batch"]):  # turn by turn
        for i, (text, _) in zip(entry["rows"], entry["samples"], strict=True):
            texts[i].append(text)
            entries[i].append(entry)
    for turns, of_task in zip(texts, entries, strict=True):
        yield Answer(turns, of_task[-1]["tstamp"])


def _finish(part: PartFile, rows: Iterator[Row]) -> str:
    finished = [finished for entry in part.entries for _, finished in entry["samples"]]
    cut = len(finished) - sum(finished)
    part.finish(rows)
    return f"{part.output}: {len(finished)} answers; {cut} of them ran into max_new_tokens"
