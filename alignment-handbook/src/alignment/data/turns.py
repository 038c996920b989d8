"""Checks that turns follow each other as they can: calls and their results, roles that alternate."""

from alignment.data.row import Messages, Row

#: What models write where they call a tool in the text itself, in the formats that are met most often.
_CALL_MARKS = ("<tool_call", "<|tool_call", "<｜tool", "<function", "<invoke", "[TOOL_CALL", "<|python_tag|>",
               "```tool", "```python", "<|action_start|>", "Action:", "<code>", "<python>")  # fmt: skip


def faults_of_calls(turns: Messages) -> dict[str, str]:
    """What is wrong with the calls of a conversation and their results, by the name of the rule.

    A result belongs to the call with its `tool_call_id`, else to the first that waits for one. All results of calls
    that were made together are to come before any other turn; calls of the last turn need none. What a model calls in
    its text is a call of which nobody knows the id.

    Example:
        >>> call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {}}}
        >>> asks = {"role": "assistant", "content": "", "tool_calls": [call]}
        >>> faults_of_calls([asks]), faults_of_calls([asks, {"role": "user", "content": "Well?"}])
        ({}, {'call_without_result': 'add is called, and other turns follow without its result'})
    """
    faults: dict[str, str] = {}
    waiting: list[Row] = []
    known: set[str] = set()
    has_called = are_known = False
    for turn in turns:
        if turn["role"] == "tool":
            answered = turn.get("tool_call_id")
            if not has_called:
                faults.setdefault("result_without_call", "a tool's turn before any call")
            elif answered and are_known and answered not in known:
                faults.setdefault("result_without_call", f"a tool's turn answers {answered!r:.60}, which no call has")
            elif (found := _answered(waiting, turn)) is not None:
                del waiting[found]
            continue
        for call in waiting[:1]:
            detail = f"{call['function']['name']} is called, and other turns follow without its result"
            faults.setdefault("call_without_result", detail)
        waiting = list(turn.get("tool_calls", []))
        in_text = turn["role"] == "assistant" and any(mark in turn["content"] for mark in _CALL_MARKS)
        known |= {call["id"] for call in waiting if "id" in call}
        are_known = all("id" in call for call in waiting) and not in_text and (are_known or not has_called)
        has_called = has_called or bool(waiting) or in_text
    return faults


def _answered(waiting: list[Row], result: Row) -> int | None:
    """Which of the calls that wait for a result this one is of."""
    identity = result.get("tool_call_id")
    fits = [i for i, call in enumerate(waiting) if identity is None or call.get("id") in (None, identity)]
    return next((i for i in fits if identity and waiting[i].get("id") == identity), next(iter(fits), None))


def doubled_role(turns: Messages) -> str | None:
    """The role of the first turn that follows one of the same role; a tool's may."""
    pairs = zip(turns, turns[1:], strict=False)
    return next((turn["role"] for turn, after in pairs if turn["role"] == after["role"] != "tool"), None)


def joined(turns: Messages) -> Messages:
    """Turns of which those that follow one of the same role are joined to it."""
    made: Messages = []
    for turn in turns:
        if not made or made[-1]["role"] != turn["role"] or turn["role"] == "tool":
            made.append(turn)
            continue
        before = made[-1]
        made[-1] = {**before, **turn, "content": "\n\n".join(filter(None, (before["content"], turn["content"])))}
        thoughts = [part["reasoning_content"] for part in (before, turn) if "reasoning_content" in part]
        calls = [call for part in (before, turn) for call in part.get("tool_calls", [])]
        if thoughts:
            made[-1]["reasoning_content"] = "\n\n".join(thoughts)
        if calls:
            made[-1]["tool_calls"] = calls
    return made
