"""Writes the model card of a run: how to use the model, results, data and recipe."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from alignment.configs import Configs
from alignment.errors import UserError
from alignment.report.tables import with_interval
from trl_nca.paper import CITATION

_RESULTS = {
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "reward accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_rewards/chosen": "implicit reward of the best response",
    "eval_rewards/rejected": "implicit reward of the others",
}
#: Captions of figures, the first ones shown, the others folded.
_CAPTIONS = {
    "rewards": "Implicit reward of the best response and of the others: how much likelier each became",
    "margin": "Implicit reward of the best response less that of the others",
    "loss": "Loss",
    "accuracy": "Share of the other responses that the best one is preferred to",
    "ranks": "Implicit reward by the rank of the response's score",
    "sampled_lengths": "Length against score, sampled answers",
    "lengths": "Length against score, training data",
    "scores": "Scores of the training data",
    "responses": "Responses to a prompt, training data",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient, before it is clipped",
    "speed": "Tokens a second",
}
_NUM_SHOWN = 2
#: The name of a model or a data set on the Hub.
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
#: First parts of a path that look like an owner on the Hub.
_FOLDERS = ("models", "model", "runs", "data", "output", "outputs", "checkpoints", "results")


class ShownOnHub:
    """What a trainer of `trl` that derives from this first writes beside its model, and says of the Hub's faults."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Upstream calls this when it saves or uploads; its own card knows no recipe, data or results."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.args.recipe["model_name_or_path"])

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Upstream calls this first. What it raises is of the Hub, the network or the token, not of the model."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise UserError(f"push_to_hub: the Hub makes no repository: {error}; or --push_to_hub=false") from error


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
    recipe, is_adapter = _read(source, "recipe.yaml"), (folder / "adapter_config.json").exists()
    name = name or folder.resolve().name
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(base, recipe, is_adapter), sort_keys=False)}---",
        f"# {name}",
        f"`{find_hub_name(base) or Path(base).name}`, aligned with explicit rewards"
        + (f" by the {recipe['loss_type']} loss." if recipe.get("loss_type") else "."),
        _results(_read(source, "eval_results.json"), _read(source, "train_results.json")),
        _usage(name, base, recipe.get("lora_r", 0) if is_adapter else None),
        _figures([figure.name for figure in figures]),
        _data(_read(source, "data_report.json")),
        _recipe(recipe),
        f"## Citation\n\nThe losses:\n\n```bibtex\n{CITATION}\n```",
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _front_matter(base: str, recipe: dict[str, Any], is_adapter: bool) -> dict[str, Any]:
    """What the Hub reads of a card. It takes names of its own models and data sets alone."""
    head: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    if (hub_name := find_hub_name(base)) is not None:
        head |= {"base_model": hub_name, "base_model_relation": "adapter" if is_adapter else "finetune"}
    card = _front_matter_of(base)
    head |= {key: card[key] for key in ("license", "license_name", "license_link") if key in card}
    mixture = (recipe.get("dataset_mixture") or {}).get("datasets") or []
    sources = [*(recipe.get("dataset_mixer") or {}), *(source["id"] for source in mixture)]
    if datasets := [source for source in sources if not Path(source).exists()]:
        head["datasets"] = datasets
    return head | {"tags": ["trl", "nca", "alignment"]}


def find_hub_name(base: str) -> str | None:
    """The name on the Hub of a model: its own, or what the cache or the config of its folder say; None if unknown."""
    if not Path(base).is_dir():
        return base if _HUB_NAME.fullmatch(base) else None
    if cached := re.search(r"models--(.+?)--(.+?)/snapshots/", f"{Path(base).resolve()}/"):
        return f"{cached[1]}/{cached[2]}"
    named = str(_read(base, "config.json").get("_name_or_path"))
    is_name = _HUB_NAME.fullmatch(named) and "/" in named and named.split("/")[0] not in (*_FOLDERS, ".", "..")
    if is_name and not Path(named).exists():
        return named
    card = _front_matter_of(base)  # of this project's, say: a merged model, aligned further
    return card.get("base_model") if "nca" in (card.get("tags") or ()) else None


def _front_matter_of(base: str) -> dict[str, Any]:
    """What the head of a model's card says: of a folder, or of a name on the Hub if its card was downloaded."""
    is_name = _HUB_NAME.fullmatch(base) and not Path(base).is_dir()
    cached = try_to_load_from_cache(base, "README.md") if is_name else None
    file = Path(base) / "README.md" if not isinstance(cached, str) else Path(cached)
    found = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8"), re.S) if file.is_file() else None
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def _usage(name: str, base: str, lora_r: int | None) -> str:
    """Commands to paste, with the folder seen from the one above. `lora_r`: rank of an adapter; None for a model."""
    if lora_r is None:
        served = f"vllm serve {name}"
    else:
        rank = max(16, 1 << (lora_r - 1).bit_length()) if lora_r else 16
        served = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={name}"
    return f"""## How to use it

With transformers{"" if lora_r is None else " and PEFT"}:

```python
from transformers import pipeline

talk = pipeline("text-generation", model="{name}")
messages = [{{"role": "user", "content": "Name a prime."}}]
print(talk(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])
```

With vLLM, behind an API like OpenAI's:

```
{served}
```

For llama.cpp and Ollama{"" if lora_r is None else ", merge it; then"} make a GGUF file, as docs/serving.md of the
repository that trained it says."""


def _figures(names: list[str]) -> str:
    """Images with their captions: the important ones, and the others folded."""
    rank = {name: i for i, name in enumerate(_CAPTIONS)}
    stems = sorted((Path(name).stem for name in names), key=lambda stem: (rank.get(stem, len(rank)), stem))
    images = []
    for stem in stems:
        caption = _CAPTIONS.get(stem, stem.replace("_", " ").capitalize())
        images.append(f"![{caption}](figures/{stem}.png)\n\n*{caption}.*")
    shown, others = "\n\n".join(images[:_NUM_SHOWN]), "\n\n".join(images[_NUM_SHOWN:])
    return "\n\n".join(filter(None, [shown, _folded("More figures", others)]))


def _recipe(recipe: dict[str, Any]) -> str:
    """The recipe in two blocks: what differs from the defaults, and the defaults, folded."""
    if not recipe:
        return ""
    defaults = _defaults()
    own = {key: value for key, value in recipe.items() if key not in defaults or defaults[key] != value}
    rest = {key: value for key, value in recipe.items() if key not in own}
    folded = _folded(f"{len(rest)} keys at their defaults", _yaml(rest) if rest else "")
    return "\n\n".join(filter(None, ["## Recipe", _yaml(own), folded]))


def _defaults() -> dict[str, Any]:
    """Defaults of a recipe's keys, as they are written into recipe.yaml."""
    found = {}
    for config in Configs.__annotations__.values():
        for field in dataclasses.fields(config):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if default is not dataclasses.MISSING:
                found[field.name] = json.loads(json.dumps(getattr(default, "value", default), default=str))
    return found


def _yaml(settings: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>" if text else ""


def _results(evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    held_out, samples = evaluation.get("eval") or {}, evaluation.get("samples") or {}
    rows = [(name, f"{held_out[key]:.4f}") for key, name in _RESULTS.items() if key in held_out]
    if samples:
        rows.append(("held-out score", f"{samples['score_before']:.3f} -> {samples['score_after']:.3f}"))
        rows.append(("its difference (95 %)", with_interval(samples, "score_difference", ".3f")))
        controlled = with_interval(samples, "length_controlled_difference", ".3f")
        rows.append(("the same, at the start's length (95 %)", controlled))
        rows.append(("KL from the reference (95 %)", with_interval(samples, "kl", "z.2f", " nats a response")))
    if training.get("seconds"):
        rows.append(("seconds of the run", f"{training['seconds']:.0f}"))
    lines = [f"| {name} | {value} |" for name, value in rows if value != "-"]
    return "\n".join(["## Results\n", "| | |", "|---|---|", *lines]) if lines else ""


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
