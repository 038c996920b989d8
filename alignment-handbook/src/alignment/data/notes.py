"""What the report says of rows beside their numbers: columns and message keys that nobody reads, and rendered text."""

from typing import Any

#: Share of the rows from which on text that looks rendered is worth a warning.
_GOOD_SHARE = 0.05
#: Columns or keys that the line names.
_MOST_NAMES = 12
_KINDS = {"columns": "column ", "message_keys": "message key "}


def describe_notes(noted: dict[str, int], num_rows: int) -> dict[str, Any]:
    """Sorts the notes of `outcomes.count_outcomes`.

    Args:
        noted: Number of rows by note, see `Group`.
        num_rows: Number of rows.

    Returns:
        `not_read`: the number of rows by column and by message key; `warnings`: sentences.

    Example:
        >>> about = describe_notes({"column source": 9, "message key name": 2, "rendered": 9}, 10)
        >>> about["not_read"]
        {'columns': {'source': 9}, 'message_keys': {'name': 2}}
        >>> about["warnings"][0][:29]
        '9 of 10 rows look as if a cha'
    """
    not_read = {
        kind: {note.removeprefix(start): n for note, n in noted.items() if note.startswith(start)}
        for kind, start in _KINDS.items()
    }
    rendered, spelt = noted.get("rendered", 0), noted.get("control_tokens", 0)
    warnings = []
    if rendered > _GOOD_SHARE * num_rows:
        warnings.append(
            f"{rendered} of {num_rows} rows look as if a chat template had rendered them before (<|im_start|>, [INST], "
            "Human:, ...), and are rendered once more: give messages or plain text"
        )
    elif spelt > _GOOD_SHARE * num_rows:
        warnings.append(
            f"{spelt} of {num_rows} rows spell control tokens of the tokenizer, which stay text: remove them, or set "
            "row_rules: {control_tokens: fix}"
        )
    return {"not_read": not_read, "warnings": warnings}


def not_read_line(not_read: dict[str, dict[str, int]]) -> str | None:
    """One line that names them; None where everything was read."""
    names = []
    for kind, found in not_read.items():
        shown = ", ".join(name or repr(name) for name in [*found][:_MOST_NAMES])
        more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
        names += [f"{kind.replace('_', ' ')} {shown}{more}"] if found else []
    return f"not read: {'; '.join(names)}" if names else None
