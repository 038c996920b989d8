"""What the report says of the weights that rows have of their own, which multiply the losses of their prompts."""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from alignment.data.reading import column


def describe_weights(rows: Dataset) -> dict[str, Any]:
    """The weights of rows as `weights`; {} for rows without the column `weight`.

    Example:
        >>> describe_weights(Dataset.from_dict({"weight": [0.5, None, 0.0]}))
        {'weights': {'mean': 0.5, 'min': 0.0, 'max': 1.0, 'rows_zero': 1, 'rows_without': 1}}
    """
    if "weight" not in rows.column_names or not len(rows):
        return {}
    given = column(rows, "weight")
    weights = pc.fill_null(given, 1.0).to_numpy()
    return {
        "weights": {
            "mean": float(weights.mean()),
            "min": float(weights.min()),
            "max": float(weights.max()),
            "rows_zero": int((weights == 0).sum()),
            "rows_without": given.null_count,
        }
    }


def weights_line(weights: dict[str, Any] | None) -> str | None:
    """One line on them; None where there are none.

    Example:
        >>> weights_line({"mean": 0.5, "min": 0.0, "max": 1.0, "rows_zero": 1, "rows_without": 1})
        'weights from 0 to 1, mean 0.5; rows of weight 0: 1; rows without a weight, which have the weight 1: 1'
    """
    if not weights:
        return None
    parts = [f"weights from {weights['min']:g} to {weights['max']:g}, mean {weights['mean']:.3g}"]
    parts += [f"rows of weight 0: {weights['rows_zero']}"] * (weights["rows_zero"] > 0)
    num_without = weights["rows_without"]
    parts += [f"rows without a weight, which have the weight 1: {num_without}"] * (num_without > 0)
    return "; ".join(parts)
