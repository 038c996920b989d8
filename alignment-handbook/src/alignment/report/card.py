"""Writes the model card of a run: data, recipe and results."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from trl_nca.paper import CITATION

_RESULTS = {
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "reward accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_rewards/chosen": "implicit reward of the best response",
    "eval_rewards/rejected": "implicit reward of the others",
}


def write_card(folder: str | Path, base: str, run: str | None = None, name: str | None = None) -> None:
    """Writes README.md beside a model, and the run's figures where there are some.

    Args:
        folder: Folder of the model.
        base: The model that was aligned.
        run: Output folder of the run that aligned it; what is not there (yet) is left out. Default: `folder`.
        name: Name of the model. Default: that of `folder`.
    """
    folder, source = Path(folder), run or str(folder)
    figures = sorted((Path(source) / "figures").glob("*.png"))
    if run:
        for figure in figures:
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(figure, folder / "figures" / figure.name)
    recipe = _read(source, "recipe.yaml")
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    head = {"library_name": library, "tags": ["trl", "nca", "alignment"]}
    if not Path(base).is_dir():  # the Hub takes names of its models alone
        head["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(head)}---",
        f"# {name or folder.resolve().name}",
        f"`{base}`, aligned with explicit rewards"
        + (f" by the {recipe['loss_type']} loss." if recipe.get("loss_type") else "."),
        _results(_read(source, "eval_results.json"), _read(source, "train_results.json")),
        "\n\n".join(f"![{figure.stem}](figures/{figure.name})" for figure in figures),
        _data(_read(source, "data_report.json")),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```" if recipe else "",
        f"## Citation\n\nThe losses:\n\n```bibtex\n{CITATION}\n```",
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def _results(evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    held_out, samples = evaluation.get("eval") or {}, evaluation.get("samples") or {}
    rows = [(name, f"{held_out[key]:.4f}") for key, name in _RESULTS.items() if key in held_out]
    if samples:
        low, high = samples["score_difference_interval"]
        rows.append(("held-out score", f"{samples['score_before']:.3f} -> {samples['score_after']:.3f}"))
        rows.append(("its difference (95 %)", f"{samples['score_difference']:.3f} [{low:.3f}, {high:.3f}]"))
    if training.get("seconds"):
        rows.append(("seconds of the run", f"{training['seconds']:.0f}"))
    return "\n".join(["## Results\n", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]) if rows else ""


def _data(report: dict[str, Any]) -> str:
    if not report:
        return ""
    dropped = ", ".join(f"{reason} {n}" for reason, n in (report.get("dropped_by_reason") or {}).items()) or "none"
    kept = f"{report.get('rows_kept', '?')} of {report.get('rows_in', '?')} rows kept (dropped: {dropped})"
    return f"## Data\n\n{kept}; {report.get('responses', '?')} responses."


def _read(run: str, name: str) -> dict[str, Any]:
    file = Path(run) / name
    if not file.is_file():
        return {}
    return (yaml.safe_load if name.endswith(".yaml") else json.loads)(file.read_text()) or {}
