"""The words of a plan, as they are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.plan import layouts
from alignment.plan.steps import Plan

#: Phases of a run, in words.
_WORDS = {
    "forward": "the end of the forward pass",
    "head": "the backward pass of the LM head",
    "last layer": "the backward pass of the last layer",
    "first layer": "the backward pass of the first layer",
    "reference": "the reference's forward pass",
    "optimizer step": "the optimizer's step",
}


def describe(plan: Plan, facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The plan as it is printed.

    Args:
        plan: The arithmetic of the steps.
        facts: What plan.json says of memory and time.
        notes: What a reader must know.
    """
    checkpointing = facts["gradient_checkpointing"]
    lines = [
        str(plan),
        *([checkpointing["summary"]] if isinstance(checkpointing, Mapping) else []),
        *([facts["time"]["summary"]] if facts["time"] and facts["fits"] else []),
        *_moments(facts),
        *_tokens(facts),
        *_table(facts["layouts"]),
        *(f"Refused: {r['what']}: {r['reason']}; use {r['fix']}" for r in facts["refused"]),
        *_legend(facts),
    ]
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])


def _moments(facts: Mapping[str, Any]) -> list[str]:
    if facts["refused"]:
        return [f"Memory per process ({facts['parallel']}): REFUSED, see below."]
    moments, limit = facts["moments_gb"], facts["gpu_memory_gb"]
    too_much = [name for name, held in moments.items() if held["total"] > limit]
    verdict = f"DOES NOT FIT: {' and '.join(too_much)} take{'s' * (len(too_much) == 1)} more" if too_much else "fits"
    if too_much and (budget := facts["largest_max_tokens_per_forward"]):
        verdict += f"; --max_tokens_per_forward={budget} fits"
    loading, training = (moments[name]["total"] for name in ("loading", "training"))
    lines = [
        f"Memory per process ({facts['parallel']}): loading {loading:.1f} GB, then training {training:.1f} GB, of "
        f"{limit:g}: {verdict}."
    ]
    for name, held in moments.items():
        at = f", at its fullest ({_WORDS[held['at']]})" if name == "training" else ""
        parts = ", ".join(f"{part} {held[part]:.2f}" for part in layouts.PARTS if held[part])
        lines.append(f"  {name}{at}: {parts}")
    if facts["cpu_memory_gb"]:
        host, processes = facts["cpu_memory_gb"], facts["processes_a_node"]
        lines.append(f"  CPU memory: {host:.1f} GB a process, {host * processes:.0f} GB on a node of {processes}")
    return lines


def _tokens(facts: Mapping[str, Any]) -> list[str]:
    if facts["refused"]:
        return []
    budget, checkpointing = facts["largest_max_tokens_per_forward"], facts["gradient_checkpointing"]
    is_auto = isinstance(checkpointing, Mapping)
    so = f", with checkpointing {'on' if checkpointing['on'] else 'off'}" if is_auto else ""
    kept = facts["activations_gb"]
    return [
        *_longest(facts["longest_response"]),
        f"  {facts['tokens_per_forward']} tokens a forward; activations {kept['with_checkpointing']:.2f} GB with "
        f"checkpointing, {kept['without_checkpointing']:.2f} without; "
        + (f"largest max_tokens_per_forward that fits{so}: {budget}" if budget else "no max_tokens_per_forward fits"),
    ]


def _longest(response: Mapping[str, Any] | None) -> list[str]:
    """How a response is run that does not fit a forward."""
    if response is None:
        return []
    start = f"  The longest response has {response['tokens']} tokens with its prompt and "
    if response["pieces"] == 1:
        return [f"{start}runs whole: {response['reason']}"]
    whole = "{with_checkpointing:.1f} GB with checkpointing, {without_checkpointing:.1f} without".format(
        **response["whole_gb"]
    )
    return [f"{start}runs in {response['pieces']} pieces; whole a step would take {whole}"]


def _table(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Both moments of each layout, in GB; no number where it is refused."""
    lines = [f"  {'layout':13} {'loading':>9} {'training':>9}  GB"]
    for name, layout in table.items():
        if layout["refused"]:
            lines.append(f"  {name:13} {'refused:':>9} {layout['refused']}")
        else:
            fits = "fits" if layout["fits"] else "does not fit"
            lines.append(f"  {name:13} {layout['loading_gb']:9.2f} {layout['training_gb']:9.2f}  {fits}")
    return lines


def _legend(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        "Per process: what one process holds; each has a GPU to itself, and all hold about as much. At its fullest: "
        "the moment of a training step that takes the most."
    ]
    if facts["parallel"] != "single":
        lines.append("What several GPUs add is arithmetic from the sources, and was not measured.")
    return lines
