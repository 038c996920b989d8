"""Responses of several turns: ids as sampling sees them at each turn, and which of them are the assistant's."""

import pytest

from tests.templates import FAMILIES, TOOLS, TRAJECTORIES, family_tokenizer, user
from trl_nca.responses import ResponseTokenizer

PROMPT = [user("What is 17 times 23?")]
RNR, TNF, CNR, PNS, REFUSED = (
    "response_not_rendered", "turns_not_found", "calls_not_rendered", "prompt_not_as_sampled", "template_refused"
)  # fmt: skip

#: Which trajectories the families cannot write as one sequence of tokens, and under which rule they are dropped.
DROPPED = {
    "qwen3": {"reasoned, user in between": RNR},
    "llama3": {"reasoned": RNR, "reasoned call": RNR, "reasoned, user in between": RNR, "two calls": REFUSED},
    "mistral": {
        "reasoned": RNR, "reasoned call": RNR, "reasoned, user in between": RNR, "call, user, call": TNF,
    },
    "deepseek_r1": {
        "answer": PNS, "call": CNR, "reasoned call": CNR, "two calls": CNR, "user in between": PNS,
        "reasoned, user in between": RNR, "call, user, call": CNR, "ends with a call": CNR,
    },
    "gpt_oss": {"two calls": CNR, "reasoned, user in between": RNR},
    "chatml_spans": {},
}  # fmt: skip


def tokenize(template, responses, tools=None, kwargs=None, prompt=PROMPT, **settings):
    tokenizer = family_tokenizer(template) if isinstance(template, str) else template
    row = {"prompt": prompt, "responses": responses, "scores": [float(k) for k in range(len(responses))]}
    return ResponseTokenizer(tokenizer, **settings), ResponseTokenizer(tokenizer, **settings)(
        row | {"tools": tools, "chat_template_kwargs": kwargs}
    )


def tools_of(turns):
    return TOOLS if any("tool_calls" in turn for turn in turns) else None


def runs(mask):
    """The (start, stop) of the tokens that count."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_as_sampled(tokenize, row, k, turns, tools=None, kwargs=None, prompt=PROMPT):
    """Holds a response to what sampling sees: at each turn the prompt's ids, then what counts, and nothing else."""
    whole = row["prompt_ids"] + row["response_ids"][k]
    mask = [False] * len(row["prompt_ids"]) + (row["token_masks"] or [[True] * len(r) for r in row["response_ids"]])[k]
    indices = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    counted = runs(mask)
    assert len(counted) == len(indices)
    for i, (start, stop) in zip(indices, counted, strict=True):
        sampled_from = tokenize.encode_prompt([*prompt, *turns[:i]], tools, kwargs)
        assert whole[:start] == sampled_from, i
        text = tokenize.tokenizer.decode(whole[start:stop])
        for part in (turns[i]["content"], turns[i].get("reasoning_content", "")):
            assert part in text, text
        assert text.count("17 * 23") == str(turns[i]).count("17 * 23")
        assert not any(turn["content"] in text for turn in turns if turn["role"] == "user"), text
    assert counted[-1][1] == len(whole), "what stands behind the last token that counts is not run"


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_goes_on_from_what_sampling_sees_or_the_row_is_dropped_by_name(family, trajectory):
    turns = TRAJECTORIES[trajectory]
    other = [*turns[:-1], {**turns[-1], "content": "No idea."}] if "tool_calls" not in turns[-1] else "No idea."
    tokenize_row, row = tokenize(FAMILIES[family], [turns, other], tools_of(turns))
    assert (row["dropped"], row["broken"]) == (DROPPED[family].get(trajectory, ""), []), row["detail"]
    if not row["dropped"]:
        check_as_sampled(tokenize_row, row, 0, turns, tools_of(turns))
