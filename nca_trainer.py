r"""Trainers that align a language model with K scored responses a prompt, or with pairs.

A step, in `_compute_loss`: log-probs of the responses under policy and reference (`trl_nca.logps`), implicit rewards
\(r = \beta\,(\log\pi - \log\pi_{ref})\), targets from the scores, and one of the losses (`trl_nca.losses`).

The trainers override named seams of trl 1.16's `DPOTrainer` only; tests/test_upstream.py pins their signatures.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model, tqdm
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from trl_nca.collate import GroupCollator
from trl_nca.logps import response_logps
from trl_nca.losses import LOSSES, reward_targets
from trl_nca.metrics import group_metrics
from trl_nca.responses import TOKENIZED_FEATURES, tokenize_dataset
from trl_nca.shared_prompt import share_prompts

logger = logging.getLogger(__name__)

#: `DPOConfig` keys that act inside upstream's loss or forward, which these trainers replace: (key, neutral value).
UNSUPPORTED = [
    ("use_liger_kernel", False),
    ("padding_free", False),
    ("loss_weights", None),
    ("ld_alpha", None),
    ("f_divergence_type", "reverse_kl"),
    ("label_smoothing", 0.0),
    ("use_weighting", False),
    ("router_aux_loss_coef", None),
    ("truncation_mode", "keep_start"),
]


@dataclass
class NCAConfig(DPOConfig):
    r"""Settings of a run: those of `trl.DPOConfig` (and so of `transformers.TrainingArguments`), and these.

    Raises:
        ValueError: A value is out of range, or a key of `DPOConfig` is set that has no meaning here.
    """

    loss_type: str = field(
        default="NCA",
        metadata={
            "help": "Loss, in any case: NCA or InfoNCA for any K; DPO (InfoNCA of a pair) or biasedNCA for pairs."
        },
    )
    beta: float = field(
        default=0.01,
        metadata={
            "help": "Multiplies the log-ratio policy / reference, summed over the response's tokens. Larger keeps the "
            "policy closer to the reference. Must be > 0."
        },
    )
    alpha: float = field(
        default=1e-4,
        metadata={
            "help": "Temperature of the targets softmax(score / alpha), in the unit of the scores. Small is one-hot on "
            "the best response, large is uniform; 0 is exactly one-hot, ties sharing the weight. Not used with pairs."
        },
    )
    tie_break: float = field(
        default=0.0,
        metadata={
            "help": "Added to the first response's score before the targets, in the unit of the scores. 0.01 is what "
            "the 2024 scripts did."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; a longer one loses its beginning. None: no bound of its own."},
    )
    shared_prompt: str = field(
        default="auto",
        metadata={
            "help": "Run each prompt once for all its responses, without padding: true, false (padded rows), or auto "
            "(true where the model can).",
            "choices": ["auto", "true", "false"],
        },
    )

    def __post_init__(self) -> None:
        by_lower = {name.lower(): name for name in LOSSES}
        if str(self.loss_type).lower() not in by_lower:
            raise ValueError(f"loss_type: unknown loss {self.loss_type!r}; choose one of {', '.join(LOSSES)}")
        if not self.beta > 0:
            raise ValueError(f"beta: must be > 0, got {self.beta}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: must be >= 0, got {self.alpha}")
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_prompt_length"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise ValueError(f"max_prompt_length: {self.max_prompt_length} fills max_length {self.max_length}")
        for key, neutral in UNSUPPORTED:
            if getattr(self, key) != neutral:
                raise ValueError(f"{key}: {getattr(self, key)!r} has no effect with these losses; remove the key")
        self.shared_prompt = str(self.shared_prompt).lower()
        if not torch.accelerator.is_available():  # recipes are written for GPUs; on a CPU they run there, in float32
            self.use_cpu, self.bf16, self.dataloader_pin_memory = True, bool(self.bf16), False
        super().__post_init__()
        self.loss_type = by_lower[str(self.loss_type[0]).lower()]  # upstream makes a list of it
        for tracker in set(self.report_to) - set(get_available_reporting_integrations()):
            raise ValueError(f"report_to: {tracker} is not installed; install it, or set report_to: none")


class NCATrainer(DPOTrainer):
    """Aligns a model with K >= 2 scored responses a prompt; K may differ by row.

    The loss of a step is the mean over the prompts of the global batch, exactly: whatever the number of processes, the
    accumulation steps, and the size of the last batch.

    Args:
        model: Name or folder of a model, or a model.
        ref_model: The reference policy. Default: the model with its adapter switched off, or, without an adapter, a
            frozen copy loaded from the same place.
        args: An `NCAConfig`.
        train_dataset: Columns `prompt`, `responses` (K a row), `scores` (K numbers), see
            `trl_nca.responses.ResponseTokenizer`; or the already tokenized `prompt_ids`, `response_ids`, `scores`.
        eval_dataset: The same, or a dict of them.
        **kwargs: Those of `trl.DPOTrainer`: `processing_class` (the tokenizer), `peft_config`, `quantization_config`,
            `callbacks`, `optimizers`.
    """

    _tag_names = ["trl", "nca"]
    _name = "NCA"
    _paper = {
        "title": "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        "id": "2402.05369",
        "citation": "@inproceedings{chen2024noise,\n"
        "    title  = {{Noise Contrastive Alignment of Language Models with Explicit Rewards}},\n"
        "    author = {Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu},\n"
        "    year   = 2024,\n    url    = {https://arxiv.org/abs/2402.05369},\n}",
    }

    #: `_compute_loss` divides by the prompts of the global batch itself, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: NCAConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **kwargs: Any,
    ):
        self._num_prompts: Tensor | None = None  # in the global batch; None while evaluating
        kwargs["data_collator"] = kwargs.get("data_collator") or GroupCollator()
        args = args or NCAConfig(output_dir="nca-run")
        super().__init__(model, ref_model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: NCAConfig, dataset_name: str) -> Dataset:
        if set(TOKENIZED_FEATURES) <= set(dataset.column_names):
            return dataset
        dataset, report = tokenize_dataset(
            self._to_groups(dataset),
            processing_class,
            args.max_length,
            args.max_prompt_length,
            args.dataset_num_proc,
            desc=f"Tokenizing {dataset_name}",
        )
        if report["rows_dropped"] or report["responses_cut"]:
            logger.warning("%s: not all rows fit: %s", dataset_name, report)
        return dataset

    def _to_groups(self, dataset: Dataset) -> Dataset:
        """Rows of `prompt`, `responses`, `scores` from the columns that this trainer takes."""
        if "rewards" in dataset.column_names and "scores" not in dataset.column_names:
            dataset = dataset.rename_column("rewards", "scores")
        _check_columns(dataset, {"prompt", "responses", "scores"})
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKENIZED_FEATURES, "ref_logps"]

    def _targets(self, scores: Tensor, response_mask: Tensor) -> Tensor:
        """Labels of the responses. Shape (B, K), from scores of shape (B, K)."""
        scores = scores.clone()
        scores[:, 0] += self.args.tie_break
        return reward_targets(scores, self.args.alpha, response_mask)

    @functools.cached_property
    def _shared_prompt(self) -> bool:
        """Whether batches run packed. Decided at the first batch, when policy and reference are both there."""
        models = [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model) if m is not None]
        return share_prompts(models, self.args.shared_prompt)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Summed log-probs of the responses under the reference. Shape (B, K), no gradient."""
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            return response_logps(model, inputs, self._shared_prompt)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        model = self.ref_model or self.model
        ref_logps: list[list[float]] = []
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"Reference log-probs of {name}"):
            table = torch.stack([self.compute_ref_log_probs(model, batch), batch["response_mask"].float()])  # (2, B, K)
            table = self.accelerator.pad_across_processes(table.transpose(0, 1), dim=2)  # (B, 2, K of all processes)
            for logps, mask in self.accelerator.gather_for_metrics(table):
                ref_logps.append(logps[mask.bool()].tolist())
        return dataset.add_column("ref_logps", ref_logps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimizer step, and the number of prompts in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_prompts = torch.tensor(sum(len(batch["scores"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(num_prompts, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        self._num_prompts = num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        scores, mask = inputs["scores"], inputs["response_mask"]
        logps = response_logps(model, inputs, self._shared_prompt)  # (B, K)
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None:
            ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        rewards = self.beta * (logps - ref_logps)
        targets = self._targets(scores, mask).to(rewards.dtype)
        losses = LOSSES[self.args.loss_type](rewards, targets, mask)  # (B,)

        self._record(group_metrics(losses, rewards, logps, scores, mask))
        if self._num_prompts is None:
            loss = losses.mean()
        else:
            # Gradients are averaged over processes; times their number, that is the sum over all prompts.
            loss = losses.sum() * self.accelerator.num_processes / self._num_prompts
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _record(self, metrics: dict[str, Tensor]) -> None:
        """Notes one value a prompt, from all processes: upstream's `log` averages them, so every prompt counts once."""
        mode = "train" if self.model.training else "eval"
        names = [name for name in metrics if "rank" not in name]
        table = torch.stack(list(metrics.values()), dim=1)  # (B, metrics), the ranks last
        table = self.accelerator.pad_across_processes(table, dim=1, pad_index=float("nan"))  # to the largest K of all
        names += [f"rewards/rank_{k}" for k in range(table.shape[1] - len(names))]
        # Evaluation fills the last batch up with prompts it has seen: gather_for_metrics drops those.
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        for name, values in zip(names, gather(table).T.tolist(), strict=True):
            if name == "loss" and mode == "train":
                continue  # the Trainer logs it, over the accumulation steps
            self._metrics[mode][name] += [value for value in values if value == value]  # not NaN


class PairwiseNCATrainer(NCATrainer):
    """Aligns a model with pairs: the case K = 2 of `NCATrainer` with one-hot targets.

    Takes TRL's preference columns: `chosen` and `rejected` (texts or messages), with `prompt` or with it inside them.
    """

    def _to_groups(self, dataset: Dataset) -> Dataset:
        _check_columns(dataset, {"chosen", "rejected"})
        if "prompt" not in dataset.column_names:
            dataset = dataset.map(extract_prompt, desc="Extracting prompts")
        return dataset.map(
            lambda row: {"responses": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]},
            remove_columns=["chosen", "rejected"],
            desc="Pairing",
        )

    def _targets(self, scores: Tensor, response_mask: Tensor) -> Tensor:
        return reward_targets(scores, 0.0, response_mask)  # one-hot on chosen


def _check_columns(dataset: Dataset, needed: set[str]) -> None:
    if not needed <= set(dataset.column_names):
        raise ValueError(f"needs columns {', '.join(sorted(needed))}; found {', '.join(dataset.column_names)}")
