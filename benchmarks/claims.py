"""What runs over several seeds say of Figure 2 of the paper, and how sure that is.

S seeds, P held-out prompts: a number of each prompt after each run, in arrays of shape (S, P).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from alignment.report.groups import Estimate
from alignment.sweep.paired import estimate

YES, NO, OPEN = "yes", "no", "not shown"


@dataclass(frozen=True)
class Claim:
    """A sentence that is put to the test, the answer, and the number that it rests on."""

    text: str
    answer: str
    estimate: Estimate


def above_zero(found: Estimate) -> str:
    """Whether a number is above zero: yes, no (it is below), or not shown (the interval contains zero)."""
    return YES if found.low > 0 else NO if found.high < 0 else OPEN


def claims(best: Mapping[str, np.ndarray], margins: Mapping[str, np.ndarray], other: str) -> list[Claim]:
    """Figure 2's claims on NCA and another loss.

    Args:
        best: By loss, the implicit reward of the best response. Each of shape (S, P), over the same seeds and prompts.
        margins: By loss, the best less the mean of the others. Shape (S, P).
        other: The loss that NCA is compared with: DPO, or InfoNCA, which is its case of K responses.
    """
    loses, keeps = estimate(-best[other]), estimate(best["NCA"])
    kept_more, wider = estimate(best["NCA"] - best[other]), estimate(margins[other] - margins["NCA"])
    return [
        Claim(f"Under {other}, the best responses lose likelihood", above_zero(loses), estimate(best[other])),
        # No fall is all that is claimed: an interval that is not below zero will do.
        Claim("Under NCA, the best responses do not lose likelihood", NO if above_zero(keeps) == NO else YES, keeps),
        Claim(f"The best responses keep more of it under NCA than under {other}", above_zero(kept_more), kept_more),
        Claim(f"The margin is larger under {other} than under NCA", above_zero(wider), wider),
    ]


def verdict(found: list[Claim]) -> str:
    """One sentence on all claims."""
    failed = [claim for claim in found if claim.answer != YES]
    if not failed:
        return "Reproduced: each claim holds."
    return "NOT reproduced in full. " + " ".join(f"{claim.text}: {claim.answer}." for claim in failed)
