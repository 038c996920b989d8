"""AlpacaEval 2's pairwise comparison with a reference's outputs, in alpaca_eval's file, and its win rates.

Which of the two outputs is shown first is drawn by a hash of the instruction, so that no order is favoured.
"""

import hashlib
import math
import re
from pathlib import Path

import numpy as np

from alignment.data.row import Row
from alignment.errors import UserError
from alignment.evaluation.endpoint import EndpointConfig
from alignment.evaluation.files import read_instructions
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

#: Instructions of the official set, whose places the length-controlled win rate knows.
OFFICIAL_INSTRUCTIONS = 805

#: Around a token's letters: white space, and the signs for it in vocabularies, which some servers send.
_SPACES = " \n\t\u0120\u010a\u2581"

_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def compare_alpaca_eval(
    outputs: str,
    reference: str,
    prompt: str,
    output_dir: str,
    config: EndpointConfig,
    settings: VerdictSettings,
    seed: int = 0,
) -> str:
    """Compares a model's outputs with a reference's, and writes `<model>/<judge>/annotations.json`.

    Args:
        outputs, reference: AlpacaEval's lists of `instruction`, `output`, `generator`. What both have is judged, in the
            order of the reference.
        prompt: A text with {instruction}, {output_1} and {output_2} that asks for "m" if output_1 is better, else for
            "M", as the last thing said; in turns where it has ChatML's `<|im_start|>`.
        output_dir, config, settings: See `judge_mt_bench.grade_mt_bench`.
        seed: Seeds the order in which outputs are shown.

    Returns:
        Win rates, and what is left to ask, for a person.

    Raises:
        UserError: See `judge_mt_bench.grade_mt_bench`.
    """
    rows = _pairs(outputs, reference, config.model)
    turns = _turns_of(prompt)
    flips = [is_flipped(row["instruction"], seed) for row in rows]
    differ = [i for i, row in enumerate(rows) if row["output_1"] != row["output_2"]]
    requests = []
    for i in differ:
        one, two = ("output_2", "output_1") if flips[i] else ("output_1", "output_2")
        texts = {"instruction": rows[i]["instruction"], "output_1": rows[i][one], "output_2": rows[i][two]}
        request = chat_request([(role, fill(text, texts)) for role, text in turns], settings)
        requests.append(request | ({"logprobs": True, "top_logprobs": 5} if settings.logprobs else {}))
    model = rows[0]["generator_2"]
    output = Path(output_dir) / file_name(model) / file_name(config.model) / "annotations.json"
    preferences: list[float | None] = [1.5] * len(rows)  # equal outputs need no judge
    with open_judge(output_dir, config) as judge:
        replies = dict(zip(differ, judge.ask(requests, f"Comparing {model}"), strict=True))
        missing = {i for i, reply in replies.items() if reply is None}
        for i in replies.keys() - missing:
            preferences[i] = preference_of(replies[i], flips[i])
        judged = [{**row, "preference": preferences[i]} for i, row in enumerate(rows) if i not in missing]
        write_rows(output, judged)
    lines = [f"{output}: {model} against {rows[0]['generator_1']}", *win_rates(judged)]
    if not missing:
        lines.append(length_controlled(judged))
    return outcome(judge, "\n".join(lines), len(judged), len(rows))


def preference_of(reply: Entry, flipped: bool) -> float | None:
    """The preference in a reply, from 1 (the reference) to 2 (the model).

    By the probabilities of "m" (the first shown) and "M" as its last token, also with a space before them, where it has
    them; else by the last letter that it says after any thinking.

    Args:
        reply: `text`, and `top_logprobs` of its last token, or None.
        flipped: Whether the model's output was shown first.

    Returns:
        None where the reply says neither.

    Example:
        >>> preference_of({"text": "M", "top_logprobs": {"M": math.log(0.6), "m": math.log(0.2)}}, flipped=False)
        1.75
        >>> preference_of({"text": " m", "top_logprobs": {" M": math.log(0.2), " m": math.log(0.6)}}, flipped=False)
        1.25
        >>> preference_of({"text": "Both are good. The best is: m", "top_logprobs": None}, flipped=True)
        2.0
    """
    top = (reply["top_logprobs"] or {}).items()
    first, second = (sum(math.exp(value) for token, value in top if token.strip(_SPACES) == name) for name in "mM")
    if first + second == 0:
        said = after_thinking(reply["text"])
        first, second = (float(re.search(rf"\b{name}\W*$", said) is not None) for name in "mM")
    if first + second == 0:
        return None
    of_second = second / (first + second)
    return round(2 - of_second if flipped else 1 + of_second, 12)  # 1.75 and not 1.7500000000000002


def is_flipped(instruction: str, seed: int) -> bool:
    """Whether the model's output is shown before the reference's."""
    return hashlib.sha256(f"{seed} {instruction}".encode()).digest()[0] % 2 == 1


def win_rates(judged: list[Row]) -> list[str]:
    """Win rate with its standard error, in percent, and the mean lengths, in characters; for a person."""
    wins = 100 * np.array([row["preference"] - 1 for row in judged if row["preference"] is not None])
    if not len(wins):
        return ["win rate: no verdict"]
    error = f"{wins.std(ddof=1) / math.sqrt(len(wins)):.2f}" if len(wins) > 1 else "-"
    model, reference = (np.mean([len(row[name]) for row in judged]) for name in ("output_2", "output_1"))
    return [
        f"win rate           {wins.mean():.2f} % (standard error {error}), {len(wins)} verdicts, "
        f"{len(judged) - len(wins)} replies without one",
        f"mean length        {model:.0f} characters, the reference's {reference:.0f}",
    ]


def length_controlled(judged: list[Row]) -> str:
    """The length-controlled win rate by the package alpaca_eval, or why there is none; for a person."""
    if len(judged) != OFFICIAL_INSTRUCTIONS:
        return f"length-controlled  needs all {OFFICIAL_INSTRUCTIONS} instructions of AlpacaEval, in their order"
    try:
        import pandas
        from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:
        return f"length-controlled  needs the package alpaca_eval ({error})"
    try:
        found = get_length_controlled_winrate(pandas.DataFrame(judged), save_weights_dir=None)
    except Exception as error:  # it loads its difficulties from the Hub; the verdicts must not be lost over that
        return f"length-controlled  alpaca_eval could not compute it: {error!r}"
    return f"length-controlled  {found['length_controlled_winrate']:.2f} %"


def _pairs(outputs: str, reference: str, annotator: str) -> list[Row]:
    """Rows of alpaca_eval's annotations without the preference, in the order of the reference."""
    ours, theirs = (read_instructions(path, "output", "generator") for path in (outputs, reference))
    rows = []
    for instruction, (_, one) in theirs.items():
        if instruction in ours:
            two = ours[instruction][1]
            row = {"instruction": instruction, "output_1": one["output"], "output_2": two["output"]}
            row |= {"generator_1": one["generator"], "generator_2": two["generator"]}
            rows.append(row | {"dataset": one.get("dataset", two.get("dataset")), "annotator": annotator})
    if not rows:
        raise UserError(f"{outputs}: none of its instructions is in {reference}; answer the reference's instructions")
    return rows


def _turns_of(path: str) -> list[tuple[str, str]]:
    """Roles and texts of a prompt file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge_prompts: {path} cannot be read: {error}") from error
    fill(text, {"instruction": "", "output_1": "", "output_2": ""}, path)
    turns = [(role, content.strip()) for role, content in _CHATML_TURN.findall(text)]
    return turns or [("user", text.strip())]
