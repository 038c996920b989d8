"""A calculator as a tool, and a reward that anybody can check: does a trajectory call it rightly, and say the number?

The score needs the right number in the column `number`, and no judge and no network:

>>> call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "3 * 4"}}}
>>> turns = [{"role": "assistant", "content": "", "tool_calls": [call]},
...          {"role": "tool", "name": "calculator", "content": "12"},
...          {"role": "assistant", "content": "The answer is 12."}]
>>> calculator_score(["There are 3 rows of 4 eggs. How many eggs are there?"], [turns], number=[12])
[1.0]
"""

import ast
import json
import math
import operator
import re
from typing import Any

Message = dict[str, Any]

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LONGEST = 100  # characters of an expression


def calculate(expression: str) -> float:
    """Computes an expression of numbers, `+ - * /` and parentheses. It is parsed and never run.

    Raises:
        ValueError: It is no such expression, or has no finite value.

    Example:
        >>> calculate("3 * (4 + 5)")
        27.0
    """
    if len(expression) > _LONGEST:
        raise ValueError("too long")
    try:
        value = float(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ArithmeticError) as error:
        raise ValueError(type(error).__name__) from error
    if not math.isfinite(value):
        raise ValueError("no finite value")
    return value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / and parentheses")


def read_turn(text: str) -> Message:
    """The assistant's turn that a sampled text is: with a call of the calculator if it ends with one.

    A call is written as `calculator.jinja` writes it: JSON between <tool_call> and </tool_call>.
    """
    found = re.fullmatch(r"(.*?)\n?<tool_call>(.*)</tool_call>\s*", text, re.DOTALL)
    try:
        call = json.loads(found[2]) if found else None
    except ValueError:
        call = None
    if found is None or not _is_call(call):
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": found[1], "tool_calls": [{"type": "function", "function": call}]}


def _is_call(call: Any) -> bool:
    """Whether this calls the calculator as its schema says."""
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or call["name"] != "calculator":
        return False
    arguments = call["arguments"]
    return isinstance(arguments, dict) and arguments.keys() == {"expression"} and isinstance(*arguments.values(), str)


def conditions_met(problem: str, turns: list[Message], number: float) -> dict[str, bool]:
    """Checks a trajectory, or a first turn that was sampled alone.

    Args:
        problem: Text of the problem.
        turns: From the assistant's first one on. A call is in its `tool_calls`, or still in its text.
        number: The right number.

    Returns:
        `call`: the first turn is a call of the calculator and nothing else. `computed`: its expression has a value.
        `numbers`: the expression has the problem's numbers, each as often. `right`: its value is the right number.
        `answer`: the last turn, behind a result, has the right number; a single text that calls, which was
        sampled alone, has no such condition.
    """
    first = turns[0] if turns[0].get("tool_calls") else read_turn(turns[0]["content"])
    calls = first.get("tool_calls") or []
    is_call = len(calls) == 1 and _is_call(calls[0]["function"]) and not first["content"].strip()
    expression = calls[0]["function"]["arguments"]["expression"] if is_call else ""
    try:
        value = calculate(expression)
    except ValueError:
        value = math.nan
    met = {
        "call": is_call,
        "computed": not math.isnan(value),
        "numbers": is_call and _numbers(expression) == _numbers(problem),
        "right": math.isclose(value, number),
    }
    if len(turns) == 1:
        return met
    last = turns[-1]
    said = [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", last["content"])]
    return met | {"answer": last["role"] == "assistant" and any(math.isclose(n, number) for n in said)}


def _numbers(text: str) -> list[float]:
    """The numbers of a text in order of size, without signs."""
    return sorted(float(found) for found in re.findall(r"\d+(?:\.\d+)?", text))


def calculator_score(prompts: list, completions: list, number: list[float], **columns: Any) -> list[float]:
    """Scores completions; has the signature of TRL's reward functions.

    Args:
        prompts: Texts, or conversations whose last turn is the problem.
        completions: Texts, or message lists: whole trajectories or first turns. One for each prompt.
        number: The right number of each problem.
        **columns: What else TRL passes; not needed.

    Returns:
        Share of the conditions that the completion meets, 0 to 1.
    """
    met = calculator_score_parts(prompts, completions, number)
    return [sum(conditions.values()) / len(conditions) for conditions in met]


def calculator_score_parts(
    prompts: list, completions: list, number: list[float], **columns: Any
) -> list[dict[str, bool]]:
    """For each completion the conditions, and whether it meets them: what the score is made of."""
    return [
        conditions_met(_last_text(prompt), _turns(completion), right)
        for prompt, completion, right in zip(prompts, completions, number, strict=True)
    ]


def _last_text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _turns(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
