"""Raw rows of reward data in their known forms."""

import gzip
import json

USER = [{"role": "user", "content": "Capital of France?"}]


ROW = {"prompt": "Capital of France?", "responses": ["Rome", "Paris", "Oslo"], "scores": [0.1, 0.9, 0.2]}


def said(text):
    return [{"role": "assistant", "content": text}]


def numbered(i, **changes):
    """A row of its own prompt."""
    return ROW | {"prompt": f"Question {i}"} | changes


def write_jsonl(path, rows):
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


GROUP = {"prompt": USER, "responses": ["Rome", "Paris", "Oslo"], "scores": [0.1, 0.9, 0.2]}


PAIR = {"prompt": USER, "responses": ["Paris", "Rome"], "scores": [0.9, 0.1]}


ULTRAFEEDBACK = {
    "instruction": "Capital of France?",
    "completions": [
        {"response": r, "overall_score": s, "fine-grained_score": 3, "annotations": {}}
        for r, s in [("Rome", 0.1), ("Paris", 0.9), ("Oslo", 0.2)]
    ],
}


LONG = [
    {"prompt_id": 1, "prompt": "Capital of France?", "response": "Rome", "score": 0.1},
    {"prompt_id": 2, "prompt": "Capital of Italy?", "response": "Rome", "score": 5},
    {"prompt_id": 1, "prompt": None, "response": "Paris", "score": 0.9},
    {"prompt_id": 2, "prompt": "Capital of Italy?", "response": "Oslo", "score": 1},
    {"prompt_id": 1, "prompt": "Capital of France?", "response": "Oslo", "score": 0.2},
]
