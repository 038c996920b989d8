"""The report on a data set: what happened to its rows, and what the remaining rows look like.

N rows, K responses of a row, all responses of all rows one behind the other in the flat arrays.
"""

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from alignment.data.lengths import Columns
from alignment.data.load import DataConfig
from alignment.data.notes import describe_notes, not_read_line
from alignment.data.outcomes import check_dropped
from alignment.data.rules import RULES, actions
from alignment.data.targets import mean_largest_target, warn_of_spread, warn_of_targets
from alignment.data.weights import describe_weights, weights_line
from alignment.errors import UserError
from trl_nca.loss_config import LossConfig

#: Percentiles of the lengths that are reported.
PERCENTILES = (50, 90, 99)


def describe(columns: Columns, alpha: float | None = None) -> dict[str, Any]:
    """Describes the rows.

    Args:
        columns: Their numbers, N >= 1.
        alpha: Temperature of the targets softmax(score / alpha), which are described too. None: they are not.

    Returns:
        `k_histogram` (rows by K), `scores` and `lengths` (each a dict), `warnings` (sentences).
    """
    scores, ks = columns.scores, columns.num_responses
    starts = np.r_[0, np.cumsum(ks)[:-1]]
    best, worst = np.maximum.reduceat(scores, starts), np.minimum.reduceat(scores, starts)
    owner = np.repeat(np.arange(len(ks)), ks)
    distinct = _count_distinct(scores, owner, len(ks))
    edges = np.histogram_bin_edges(scores, bins=min(40, max(len(np.unique(scores)), 1)))
    about_scores = {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
        "spread_in_row": float((best - worst).mean()),
        "std_in_row": float(np.sqrt(_within(scores, scores, starts, ks)).mean()),
        "rows_constant": int((best == worst).sum()),
        "rows_with_ties": int((distinct < ks).sum()),
        "rows_with_tied_best": int((np.add.reduceat(scores == best[owner], starts) > 1).sum()),
        "length_correlation": _correlation_in_rows(scores, columns.response_lengths.astype(float), starts, ks),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(scores, edges)[0].tolist()},
        "length_by_score": _length_by_score(scores, columns.response_lengths),
    }
    warnings = []
    if alpha is not None:
        largest = mean_largest_target(scores, ks, alpha)
        about_scores |= {"alpha": alpha, "mean_largest_target": largest}
        warnings = warn_of_targets(about_scores, float((1 / ks).mean()))
    values, counts = np.unique(ks, return_counts=True)
    context = columns.context_lengths
    return {
        "k_histogram": {str(k): int(n) for k, n in zip(values, counts, strict=True)},
        "scores": about_scores,
        "lengths": {
            "unit": columns.unit,
            "prompt": _percentiles(columns.prompt_lengths),
            "response": _percentiles(columns.response_lengths),
            **({"context": _percentiles(context)} if context is not None and context.any() else {}),
        },
        "warnings": warnings,
    }


def _within(a: np.ndarray, b: np.ndarray, starts: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """Covariance of two numbers over the responses of each row. Shape (N,)."""
    means = [np.repeat(np.add.reduceat(x, starts) / ks, ks) for x in (a, b)]
    return np.add.reduceat((a - means[0]) * (b - means[1]), starts) / ks


def _correlation_in_rows(a: np.ndarray, b: np.ndarray, starts: np.ndarray, ks: np.ndarray) -> float | None:
    """Mean over the rows of the correlation over their responses; None where no row has one."""
    spread = np.sqrt(_within(a, a, starts, ks) * _within(b, b, starts, ks))
    varies = spread > 0
    return float((_within(a, b, starts, ks)[varies] / spread[varies]).mean()) if varies.any() else None


def _length_by_score(scores: np.ndarray, lengths: np.ndarray) -> dict[str, list[float]]:
    """Mean length of the responses of each score; of more than ten scores, of each tenth of the responses by score."""
    distinct = np.unique(scores)
    edges = distinct if len(distinct) <= 10 else np.quantile(scores, np.linspace(0.1, 0.9, 9))
    which = np.searchsorted(edges, scores, side="right")  # equal scores stay together
    parts = [which == part for part in np.unique(which)]
    means = {"score": scores, "length": lengths}
    return {name: [float(values[part].mean()) for part in parts] for name, values in means.items()}


def _count_distinct(scores: np.ndarray, owner: np.ndarray, num_rows: int) -> np.ndarray:
    order = np.lexsort((scores, owner))
    is_new = np.r_[True, (np.diff(scores[order]) != 0) | (np.diff(owner[order]) != 0)]
    return np.bincount(owner[order][is_new], minlength=num_rows)


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    found = np.percentile(lengths, PERCENTILES)
    return {
        "mean": float(lengths.mean()),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "max": int(lengths.max()),
    }


def data_report(
    name: str,
    config: DataConfig,
    read: dict[str, Any],
    tokenized: dict[str, Any],
    rows: Dataset,
    loss: LossConfig | None,
) -> dict[str, Any]:
    """The report on a data set that is ready to be trained on.

    Args:
        name: Name of the data set.
        config: Which rows end the run.
        read: Counts from `alignment.data.load.load_groups`.
        tokenized: Counts from tokenizing the rows that it kept, by `trl_nca.responses.tokenize_dataset`.
        rows: The token ids that are left.
        loss: The loss that makes targets of the scores; None for preference pairs, whose targets are 1 and 0.

    Raises:
        UserError: More rows were dropped than the config allows, or one of a kind that ends the run; or all weights
            are 0.
    """
    dropped = _sum(read["dropped_by_reason"], tokenized["dropped_by_reason"])
    counts = {
        "lines_in": read["lines_in"],
        "rows_in": read["rows_in"],
        "rows_kept": tokenized["rows_kept"],
        "rows_fixed": tokenized["rows_fixed"],
        "rows_dropped": sum(dropped.values()),
        "dropped_by_reason": dropped,
        "fixed_by_reason": _sum(read["fixed_by_reason"], {"duplicate_response": tokenized["rows_merged"]}),
        "examples": {
            reason: [*read["examples"].get(reason, []), *tokenized["examples"].get(reason, [])] for reason in dropped
        },
        **{key: read[key] for key in ("repeated_prompts", "prompts_shared_with_eval") if key in read},
        "responses": tokenized["responses"],
    }
    for reason, num in tokenized["dropped_by_reason"].items():
        if actions(config.row_rules)[reason] == "fail":
            raise UserError(
                f"{name}: {reason} in {num} rows: {tokenized['examples'][reason][0]}; fix them, or set row_rules: "
                f"{reason}: drop"
            )
    check_dropped(name, counts, config.max_dropped_fraction)
    weights = describe_weights(rows)
    if weights and weights["weights"]["max"] == 0:
        raise UserError(
            f"{name}: all weights are 0: nothing would be learned; change the rows' column weight, or remove it"
        )
    notes = describe_notes(read["noted"], read["rows_in"] - read["rows_dropped"])
    columns = Columns.of_tokens(rows)
    uses_alpha = loss is not None and loss.loss.uses_alpha
    report = counts | notes | describe(columns, loss.alpha if uses_alpha else None) | weights
    if loss is not None and not uses_alpha:
        report["warnings"] += warn_of_spread(columns.scores, columns.num_responses, loss)
    report["warnings"] += notes["warnings"]
    cut = {key: tokenized[key] for key in ("responses_cut", "prompts_trimmed")}
    report["warnings"] += [
        f"{num} rows are kept though they break the rule {reason}: {RULES[reason].meaning}"
        for reason, num in tokenized["kept_by_reason"].items()
    ]
    report["lengths"] |= cut | {"share_truncated": cut["responses_cut"] / max(tokenized["responses"], 1)}
    return report


def _sum(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Counts by reason, without those of nothing."""
    return dict(Counter(counts) + Counter(more))


def summary(name: str, report: dict[str, Any]) -> str:
    """A report in a few lines.

    Args:
        name: Name of the data set.
        report: As in data_report.json; the held-out rows under `eval` follow.
    """
    reasons = ", ".join(f"{reason} {n}" for reason, n in report["dropped_by_reason"].items()) or "none"
    fixed_by_reason = report.get("fixed_by_reason", report.get("mended_by_reason", {}))  # its name before
    fixed = ", ".join(f"{reason} {n}" for reason, n in fixed_by_reason.items())
    scores, lengths = report["scores"], report["lengths"]
    correlation = scores["length_correlation"]
    lines = [
        f"{name}: {report['rows_kept']} of {report['rows_in']} rows kept (dropped: {reasons})"
        + (f"; fixed: {fixed}" if fixed else "")
        + f"; {report['responses']} responses",
        f"  {_responses(report['k_histogram'])}; scores {scores['mean']:.3g} +- {scores['std']:.2g}, "
        f"within a prompt +- {scores['std_in_row']:.2g}, from {scores['min']:g} to {scores['max']:g}; "
        f"rows with ties {scores['rows_with_ties']}; correlation with length "
        + ("none" if correlation is None else f"{correlation:+.2f}")
        + (f"; mean largest target {scores['mean_largest_target']:.2f}" if "alpha" in scores else ""),
        "  " + "; ".join(
            f"{part} {lengths['unit']} p50 {found['p50']:.0f}, p99 {found['p99']:.0f}, longest {found['max']}"
            for part, found in lengths.items() if isinstance(found, dict)
        ) + (f"; cut at max_length {lengths['responses_cut']}, prompts trimmed {lengths['prompts_trimmed']}"
             if "responses_cut" in lengths else ""),
    ]  # fmt: skip
    more = [weights_line(report.get("weights")), not_read_line(report.get("not_read", {}))]
    lines += [f"  {line}" for line in more if line]
    lines += [f"  {reason}: {found[0]}" for reason, found in report.get("examples", {}).items()]
    lines += [f"  WARNING: {warning}" for warning in report["warnings"]]
    return "\n".join(lines + ([summary("eval", report["eval"])] if report.get("eval") else []))


def _responses(histogram: dict[str, int]) -> str:
    """`4 responses in 36 prompts, 5 in 73`; of many different numbers the smallest and the largest."""
    ks = sorted(map(int, histogram))
    if len(ks) > 12:
        return f"{ks[0]} to {ks[-1]} responses a prompt"
    counts = [f"{k} in {histogram[str(k)]}" for k in ks[1:]]
    prompts = histogram[str(ks[0])] if ks else 0
    first = f"{ks[0]} responses in {prompts} prompt{'s' * (prompts != 1)}" if ks else "no responses"
    return ", ".join([first, *counts])
