"""The embedded trajectories: the calculator and its verifier, the rows of data/, the template that writes them."""

import json

import pytest
from transformers import AutoTokenizer

from alignment.sampling.reward_function import call_reward_function, call_score_parts, load_reward_function
from tests.conftest import MODEL, ROOT, needs_model
from trl_nca.responses import ResponseTokenizer
from trl_nca.user_code import load_function

SPEC = f"{ROOT}/data/calculator.py"
AGENT = f"{ROOT}/data/make_trajectories.py"
TEMPLATE = (ROOT / "data" / "calculator.jinja").read_text()
PROBLEM = "Ben buys 3 bags of 12 nuts and loses 5. How many nuts are left? Use the calculator."


def rows(name):
    return [json.loads(line) for line in (ROOT / "data" / f"calculator_{name}.jsonl").read_text().splitlines()]


def called(expression, *later, text="", name="calculator"):
    """A trajectory that calls the calculator; `later` are the turns behind: a result and an answer."""
    call = {"type": "function", "function": {"name": name, "arguments": {"expression": expression}}}
    turns = [{"role": "tool", "name": "calculator"}, {"role": "assistant"}]
    behind = [{**turn, "content": said} for turn, said in zip(turns, later, strict=False)]
    return [{"role": "assistant", "content": text, "tool_calls": [call]}, *behind]


def written(expression, before="", name="calculator"):
    call = json.dumps({"name": name, "arguments": {"expression": expression}})
    return f"{before}<tool_call>\n{call}\n</tool_call>"


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3 * 12 - 5", 31), (" (1 + 2) / 4 ", 0.75), ("-7 + 2.5", -4.5), ("2 - -3", 5)],
)
def test_the_calculator_computes(expression, value):
    assert load_function(f"{SPEC}:calculate")(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2 +", "1 / 0", "19 + 23 = 42", "2 ** 9", "9 % 4", "abs(3)", "__import__('os')", "'a' * 3", "True + 1", "3j",
     "a", "1e308 * 10", "[1][0]", "(" * 60, "9" * 101, "1\0"],
)  # fmt: skip
def test_the_calculator_refuses(expression):
    with pytest.raises(ValueError):
        load_function(f"{SPEC}:calculate")(expression)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (called("3 * 12 - 5", "31", "The answer is 31."), 1),
        (called("12 * 3 - 5", "31", "31 nuts are left."), 1),
        (called("3 * 12 - 5", "31", "The answer is 36."), 4 / 5),
        (called("3 * 12 + 5", "41", "The answer is 41."), 3 / 5),  # the problem's numbers, and another operation
        (called("31 + 0", "31", "The answer is 31."), 4 / 5),  # and the other way round
        (called("3 * 12", "36", "The answer is 36."), 2 / 5),
        (called("12 = 3", "error: SyntaxError", "The answer is 31."), 2 / 5),
        (called("3 - 12 - 22", "-31", "The answer is -31."), 2 / 5),
        (called("3 * 12 - 5", "31", "The answer is 31.", name="python"), 1 / 5),
        (called("3 * 12 - 5", "31", "The answer is 31.", text="I call it."), 1 / 5),
        (called("3 * 12 - 5", "31"), 4 / 5),  # without an answer
        (called("3 * 12 - 5"), 1),  # the first turn alone: nothing more could be said
        (written("3 * 12 - 5"), 1),
        (written("3 * 12"), 1 / 2),
        (written("3 * 12 - 5", before="I call it.\n"), 0),
        (written("3 * 12 - 5") + " Right?", 0),
        (written("3 * 12 - 5") * 2, 0),
        ("<tool_call>\n{'name': 'calculator'}\n</tool_call>", 0),
        ('<tool_call>\n{"name": "calculator", "arguments": {"expression": 31}}\n</tool_call>', 0),
        ('<tool_call>\n{"name": "calculator", "arguments": {"expression": "31"}, "id": 1}\n</tool_call>', 0),
        ("<tool_call>\n[31]\n</tool_call>", 0),
        ("The answer is 31.", 0),
        ("", 0),
    ],
)
def test_the_verifier(completion, score):
    calculator_score = load_reward_function(f"{SPEC}:calculator_score")
    for prompt in (PROBLEM, [{"role": "user", "content": PROBLEM}]):
        assert calculator_score([prompt], [completion], number=[31]) == [pytest.approx(score)]


def test_held_out_samples_are_scored_with_their_parts():
    """As a run does: samples are texts, the right number is in a column."""
    row = {"prompt": [{"role": "user", "content": PROBLEM}], "number": 31, "responses": [written("3 * 12"), "31"]}
    score = load_reward_function(f"{SPEC}:calculator_score")
    assert call_reward_function(score, "calculator_score", [row], ["row 1"]) == [[0.5, 0.0]]
    assert call_score_parts(score, "calculator_score", [row], ["row 1"]) == [
        {"call": [1, 0], "computed": [1, 0], "numbers": [0, 0], "right": [0, 0]}
    ]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_rows_carry_the_verifiers_score(name):
    score = load_reward_function(f"{SPEC}:calculator_score")
    for row in rows(name):
        responses, scores = row["responses"], row["scores"]
        assert len(responses) == len(scores) == 4
        assert len(set(scores)) > 1
        assert score([row["prompt"]] * 4, responses, [row["number"]] * 4) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_rows_are_those_of_the_agent(name):
    """A part of the script's problems, in their order; a call is followed by what the calculator says to it."""
    make_problems, run_call = (load_function(f"{AGENT}:{function}") for function in ("make_problems", "run_call"))
    make_prompt, counts = make_problems.__globals__["make_prompt"], make_problems.__globals__["COUNTS"]
    problems = iter(make_problems(name, counts[name], 0).items())
    for row in rows(name):
        assert any(make_prompt(problem) == row["prompt"] and row["number"] == number for problem, number in problems)
        assert len({json.dumps(response) for response in row["responses"]}) == 4
        for first, *later in row["responses"]:
            assert first["role"] == "assistant"
            if "tool_calls" in first:
                result, answer = later
                assert result == run_call(first["tool_calls"][0])
                assert [*answer] == ["role", "content"] and answer["role"] == "assistant"
            else:
                assert not later


def test_the_agent_goes_on_after_a_call():
    sample_trajectories = load_function(f"{AGENT}:sample_trajectories")
    asked = []

    class Agent:
        def turns(self, conversations, num_samples, max_new_tokens):
            asked.append(conversations)
            if len(asked) == 1:
                return [[written("3 * 12"), "I say 31.", "I say 31.", written("12 =")], [written("2 + 2")]]
            return [["It is 36."], ["An error."], []]  # the last one ran into the limit

    prompts = [[{"role": "user", "content": text}] for text in ("first", "second")]
    (call, text, failed), second = sample_trajectories(Agent(), prompts)
    assert call == called("3 * 12", "36", "It is 36.")
    assert text == [{"role": "assistant", "content": "I say 31."}]
    assert [turn["content"] for turn in failed[1:]] == ["error: SyntaxError", "An error."]
    assert second == []
    assert asked[1][0] == prompts[0] + call[:2]


def as_written(turn):
    """A turn as calculator.jinja writes it behind what opens it."""
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    return turn["content"] + "".join(written(call["arguments"]["expression"]) for call in calls) + "<|im_end|>\n"


@needs_model
def test_the_assistants_tokens_count_alone():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenize = ResponseTokenizer(tokenizer)
    for row in rows("eval")[:8]:
        done = tokenize(row)
        assert not done["dropped"]
        settings = {"tools": row["tools"], "add_generation_prompt": True, "return_dict": True}
        assert done["prompt_ids"] == tokenizer.apply_chat_template(row["prompt"], **settings)["input_ids"]
        assert {name: tokenizer.decode(done["prompt_ids"]).count(name) for name in ("<tools>", "<tool_response>")} == {
            "<tools>": 1,
            "<tool_response>": 2,
        }
        for turns, ids, mask in zip(row["responses"], done["response_ids"], done["token_masks"], strict=True):
            scored, context = (
                tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts is side])
                for side in (True, False)
            )
            assert scored == "".join(as_written(turn) for turn in turns if turn["role"] == "assistant")
            results = [turn["content"] for turn in turns if turn["role"] == "tool"]
            assert context == "".join(
                f"<|im_start|>tool\n<tool_response>\n{result}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
                for result in results
            )


def test_problems_are_held_out_and_the_files_small():
    train, held_out = ({row["prompt"][-1]["content"] for row in rows(name)} for name in ("train", "eval"))
    assert len(train) >= 60
    assert len(held_out) >= 25
    assert not train & held_out
    assert all((ROOT / "data" / f"calculator_{name}.jsonl").stat().st_size < 300_000 for name in ("train", "eval"))
