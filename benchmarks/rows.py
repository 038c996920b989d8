"""The rows that are run: their lengths are those of a case, their tokens random or those of a text."""

import importlib.util
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.tiny import tiny_tokenizer

# Lengths are log-normal: within a row of AlpacaEval's or UltraFeedback's responses, log-lengths spread by 0.8, and so
# do the rows' means. The longest of a row is then about 1.9 (K = 8) or 1.65 (K = 4) times the row's mean.
SPREAD = 0.8
EMBEDDED = Path(__file__).parents[1] / "data" / "checkable_train.jsonl"
MODEL = "models/SmolLM2-135M-Instruct"


@dataclass
class Case:
    """A kind of rows, and how they are run."""

    name: str
    num_responses: int
    prompt_tokens: int  # mean
    response_tokens: int  # mean
    ragged: bool = True
    prompts: int = 1  # of an optimizer step, in micro-batches of one
    precision: str = "fp32"
    checkpointing: bool = False
    max_tokens: int | None = None  # of a forward, where a system can bound it
    max_length: int | None = None  # of prompt and response
    vocabulary: int = 32000  # ids are drawn from
    text: bool = False  # pieces of the embedded data's text, in place of random ids
    paged: bool = False  # AdamW whose state moves out of a GPU that is full
    systems: tuple[str, ...] = ("padded", "ours, reference cached", "ours")


def draw_rows(case: Case, count: int) -> list[dict[str, Any]]:
    """Rows of random token ids, or of text, with the case's lengths; the same for the same case."""
    rng = random.Random(0)
    text = text_ids(case.vocabulary) if case.text else []

    def tokens(count: int) -> list[int]:
        if not case.text:
            return rng.choices(range(3, case.vocabulary), k=count)
        at = int(rng.random() * (len(text) - count))  # a draw each, so that lengths are those of any text
        return text[at : at + count]

    def length(mean: float, spread: float = SPREAD) -> int:
        if not case.ragged:
            return round(mean)
        return max(4, min(round(mean * rng.lognormvariate(-(spread**2) / 2, spread)), 8 * round(mean)))

    rows = []
    for _ in range(count):
        mean = length(case.response_tokens, 0.4)
        responses = [length(mean) for _ in range(case.num_responses)]
        prompt = length(case.prompt_tokens, 0.4)
        if case.max_length:
            prompt = min(prompt, case.max_length // 2)
            responses = [min(n, case.max_length - prompt) for n in responses]
        rows.append(
            {
                "prompt_ids": tokens(prompt),
                "response_ids": [tokens(n) for n in responses],
                "scores": [rng.random() for _ in responses],
            }
        )
    return rows


def tiny_row(case: Case) -> dict[str, Any]:
    """A row to warm up with."""
    responses = [[5, 6, 7, 8]] * case.num_responses
    return {"prompt_ids": [3, 4, 5], "response_ids": responses, "scores": [k / 10 for k in range(case.num_responses)]}


@cache
def text_ids(vocabulary: int) -> list[int]:
    """The embedded data's text as one list of token ids, those beyond the vocabulary left out.

    Tokens are Mistral's where the wheel mistral-common (and sentencepiece) is there, else SmolLM2's, else the tests'.
    """
    rows = [json.loads(line) for line in EMBEDDED.read_text().splitlines()]
    text = "\n\n".join(part for row in rows for part in (row["prompt"][0]["content"], *row["responses"]))
    wheel = importlib.util.find_spec("mistral_common")
    if wheel and wheel.origin and importlib.util.find_spec("sentencepiece"):
        from sentencepiece import SentencePieceProcessor

        ids = SentencePieceProcessor(str(Path(wheel.origin).parent / "data" / "tokenizer.model.v1")).encode(text)
    else:
        ids = tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [i for i in ids if i < vocabulary]


def tokenizer() -> Any:
    """What the trainers ask for; rows are token ids already."""
    return AutoTokenizer.from_pretrained(MODEL) if Path(MODEL).is_dir() else tiny_tokenizer()
