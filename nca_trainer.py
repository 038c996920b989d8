r"""Trainers that align a language model with K scored responses a prompt, or with pairs.

A step, in `compute_loss`: log-probs of the responses under policy and reference (`trl_nca.logps`); targets from the
scores, implicit rewards \(r = \beta\,(\log\pi - \log\pi_{ref})\) (`trl_nca.objective`); a loss (`trl_nca.losses`).

The trainers override named seams of trl 1.16's `DPOTrainer` only: `trl_nca.seams`, checked when this is imported.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOTrainer

from trl_nca import paper
from trl_nca.adapter_reference import AdapterReference
from trl_nca.checkpoints import AtomicCheckpoints, RunStopped
from trl_nca.chunks import NumForwards, logps_for_training, logps_without_gradient, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.columns import checked_rows, is_tokenized, scored_pairs, scored_responses, tokenized_rows, with_locations
from trl_nca.config import NCAConfig
from trl_nca.distributed import most_forwards, no_sync, policy_as_reference
from trl_nca.layers import cast_adapter_to_float32, keep_4bit_weights
from trl_nca.logps import Batch, prepare, response_logps
from trl_nca.metrics import group_metrics
from trl_nca.nonfinite import SkipNonFiniteSteps
from trl_nca.objective import make_targets, prompt_losses
from trl_nca.pieces import Cutting, find_cutting
from trl_nca.preemption import StopOnSigterm
from trl_nca.reference import cache_file, describe_reference, reference_logps
from trl_nca.responses import TOKENIZED_FEATURES
from trl_nca.router import RouterLoss, check_router
from trl_nca.sampler import group_by_length
from trl_nca.seams import check_seams
from trl_nca.self_check import evaluating
from trl_nca.step_metrics import StepMetrics
from trl_nca.token_metrics import TokenMetrics

check_seams(DPOTrainer)


class NCATrainer(AtomicCheckpoints, DPOTrainer):
    """Aligns a model with K >= 2 scored responses a prompt; K may differ by row.

    The loss of a step is the mean over the prompts of the global batch, exactly: whatever the number of processes, the
    accumulation steps, and the size of the last batch. A mixture of experts is also trained by `router_aux_loss_coef`
    (None: the model's own) times its load-balancing loss, averaged likewise; it is logged as `aux_loss`, not in `loss`.

    Args:
        model: Name or folder of a model, or a model.
        ref_model: The reference policy. Default: the model with its adapter switched off, or, without an adapter, a
            frozen copy loaded from the same place.
        args: An `NCAConfig`.
        train_dataset: Columns `prompt`, `responses` (K a row), `scores` (K numbers), see
            `trl_nca.responses.ResponseTokenizer`; or the already tokenized `prompt_ids`, `response_ids`, `scores`
            and, where not all tokens of the responses count, `token_masks`.
            A column `weight` multiplies the loss of its prompt.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer. Default: the model's own.
        peft_config, quantization_config: An adapter, such as a `LoraConfig`, and a base in 4 or 8 bits under it.
        callbacks, optimizers: As in `transformers.Trainer`.
        **kwargs: Others of `trl.DPOTrainer`, such as `data_collator`.
    """

    _tag_names = ["trl", "nca"]
    _name = "NCA"
    _paper = {"title": paper.TITLE, "id": paper.ARXIV, "citation": paper.CITATION}

    #: Whether the rows are preference pairs.
    pairs = False
    #: `compute_loss` divides by the prompts of the global batch itself, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: NCAConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        **kwargs: Any,
    ):
        args = args or NCAConfig(output_dir="nca-run")
        kwargs["data_collator"] = kwargs.get("data_collator") or GroupCollator(args.ld_alpha)
        super().__init__(
            model, ref_model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, optimizers=optimizers,
            processing_class=processing_class, peft_config=peft_config, quantization_config=quantization_config,
            callbacks=callbacks, **kwargs,
        )  # fmt: skip
        check_router(self.model, self.aux_loss_enabled)
        keep_4bit_weights(self.model)
        if not self.is_fsdp_enabled:  # which shards the adapter with the base, in one type
            cast_adapter_to_float32(self.model)
        self._adapter_reference  # noqa: B018  now: the weights are those that training starts from
        if not self._is_sharded:  # else at the first batch, when the models are put together
            self._cutting  # noqa: B018
        self.step_metrics = StepMetrics(self)
        self.nonfinite, self.preemption = SkipNonFiniteSteps(self), StopOnSigterm(self)
        self.add_callback(self.nonfinite)
        self.add_callback(self.preemption)

    def _send_telemetry(self) -> None:
        """Sends nothing, where upstream reports model family, hardware and settings to the Hub."""

    # Data

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: NCAConfig, dataset_name: str) -> Dataset:
        dataset = with_locations(dataset, dataset_name)
        if is_tokenized(dataset):
            return checked_rows(dataset, dataset_name)
        return tokenized_rows(self._to_groups(dataset), dataset_name, processing_class, args)

    def _to_groups(self, dataset: Dataset) -> Dataset:
        """Rows of `prompt`, `responses`, `scores` from the columns that this trainer takes."""
        return scored_responses(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*TOKENIZED_FEATURES, "token_masks", "weight", "ref_logps"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return group_by_length(self.train_dataset if train_dataset is None else train_dataset, self.args)

    # The reference

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Summed log-probs of the responses under the reference. Shape (B, K), no gradient."""
        weights = self._adapter_reference.weights() if self._adapter_reference else contextlib.nullcontext()
        with evaluating(model), weights:  # what does not train is not checkpointed either
            return logps_without_gradient(self._logps_fn(model), *self._chunks(inputs))

    @functools.cached_property
    def _adapter_reference(self) -> AdapterReference | None:
        """The reference's weights, where it is the policy itself. Made before a checkpoint's weights are loaded."""
        if self.ref_model is not None or not is_peft_model(self.model):
            return None
        policy = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            return AdapterReference(policy, self._is_sharded, precomputed=self.precompute_ref_logps)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if not self.args.has_reference:
            return dataset.add_column("ref_logps", [[0.0] * len(scores) for scores in dataset["scores"][:]])
        if self.args.max_tokens_per_forward and not self.args.precompute_ref_batch_size:
            batch_size = max(batch_size, 32)  # rows to fill forwards with: their tokens are bounded anyway
        model = self.ref_model or policy_as_reference(self)

        def score(rows: list[dict[str, Any]]) -> list[list[float]]:
            batch = self._prepare_inputs(self.data_collator(rows))
            logps = self.compute_ref_log_probs(model, batch)
            return [values[: len(row["response_ids"])] for values, row in zip(logps.tolist(), rows, strict=True)]

        reference = self.accelerator.unwrap_model(model)
        settings = {"precision": self.accelerator.mixed_precision, "shared_prompt": self._shared_prompt}
        settings |= {} if self.args.ld_alpha is None else {"ld_alpha": self.args.ld_alpha}
        switched_off = self._adapter_reference.switched_off if self._adapter_reference else None
        description = describe_reference(reference, dataset, switched_off, **settings)
        file = cache_file(description, self.args.ref_logps_dir)
        logps = reference_logps(dataset, file, description, score, batch_size, desc=f"Reference log-probs of {name}")
        return dataset.add_column("ref_logps", logps)

    # The step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimizer step, and the number of prompts in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [sum(len(b["scores"]) for b in batches), sum(b.get("best_length", 0) for b in batches)]
        totals = torch.stack([torch.full((), count, device=device) for count in counts])  # filled there, not copied
        num_prompts, best_length = self.accelerator.reduce(totals, reduction="sum")
        forwards = most_forwards(self, batches)
        more = [{"num_forwards": n, "mean_best_length": best_length / num_prompts} for n in forwards]
        return [b | m for b, m in zip(batches, more, strict=True)], num_prompts

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss of a micro-batch, a scalar. `num_items_in_batch`: prompts of the step; None while evaluating."""
        scores, mask = inputs["scores"], inputs["response_mask"]
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None:
            ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        targets = make_targets(scores, mask, self.args, self.pairs)
        losses_of = functools.partial(prompt_losses, batch=inputs, ref_logps=ref_logps, targets=targets, args=self.args)
        router = RouterLoss(inputs, self.router_aux_loss_coef if self.aux_loss_enabled else None)
        tokens = TokenMetrics(inputs)

        def average(losses: Tensor) -> Tensor:
            """This micro-batch's part of the mean over the prompts of the global batch."""
            losses = losses + router.pop_gradient_term()
            if num_items_in_batch is None:
                return losses.mean()
            # Gradients are averaged over processes; times their number, that is the sum over all prompts.
            return losses.sum() * self.accelerator.num_processes / num_items_in_batch

        logps_fn, (chunks, at_least) = self._logps_fn(model, router, tokens), self._chunks(inputs)
        if torch.is_grad_enabled():
            logps = logps_for_training(
                logps_fn,
                chunks,
                separable=self.args.loss.separable,
                backward=lambda logps: self._backward(average(losses_of(logps)[0])),
                no_sync=lambda: no_sync(self.accelerator, model),
                at_least=at_least,
            )
        else:
            logps = logps_without_gradient(logps_fn, chunks, at_least)
        losses, rewards = losses_of(logps)
        loss = average(losses)
        ref_logps = ref_logps if self.args.has_reference else None
        of_rewards = group_metrics(losses, rewards, logps, scores, mask, ref_logps)
        self.step_metrics.record(router.metrics | tokens.metrics | of_rewards, inputs)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    @functools.cached_property
    def _shared_prompt(self) -> bool:
        """Whether batches run packed. Decided when policy and reference are both there."""
        try:
            with self.accelerator.autocast():
                return prepare(self._models, self.args.shared_prompt, self.args.check_logps)
        except ValueError as error:
            raise (RunStopped(str(error)) if self.is_in_train else error) from error

    @functools.cached_property
    def _cutting(self) -> Cutting:
        """Which responses are run in pieces."""
        args, find = self.args, self.accelerator.autocast()(find_cutting)
        return find(self._models, args.max_tokens_per_forward, self._shared_prompt, self._is_sharded, args.check_logps)

    @property
    def _models(self) -> list[nn.Module]:
        return [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model) if m is not None]

    def _logps_fn(self, model: nn.Module, *collectors: RouterLoss | TokenMetrics) -> Callable[[Batch], Tensor]:
        run, shared_prompt = self.accelerator.autocast()(response_logps), self._shared_prompt
        return lambda batch: run(model, batch, shared_prompt, *collectors)

    def _chunks(self, inputs: Batch) -> tuple[list[Batch], NumForwards]:
        """The chunks, and the forwards to run at least: of a training step's batches they are known before it."""
        num_forwards = inputs["num_forwards"] if "num_forwards" in inputs else most_forwards(self, [inputs])[0]
        most = self.args.max_tokens_per_forward
        return split_batch(inputs, most, self._shared_prompt, self._cutting), num_forwards

    def _backward(self, loss: Tensor) -> None:
        """As in `Trainer.training_step`, for the chunks whose gradient it does not see."""
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss, **{"scale_wrt_gas": False} if self.is_deepspeed_enabled else {})

    # Metrics, stops, saving

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def eval_metrics(self) -> Mapping[str, list[float]]:
        """Metrics of the evaluation that is running: a list of numbers for each, one a prompt."""
        return self._metrics["eval"]

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Does nothing, where upstream would wait for all processes: `StepMetrics` counts, once a step."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm as a number. It is read together with the step's metrics, which comes next."""
        return self.step_metrics.gather(super()._get_grad_norm(model, grad_norm))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.preemption.listening():
            return super().train(*args, **kwargs)


class PairwiseNCATrainer(NCATrainer):
    """Aligns a model with pairs: the case K = 2 of `NCATrainer` with one-hot targets.

    Takes TRL's preference columns: `chosen` and `rejected` (texts or messages), with `prompt` or with it inside them.
    """

    pairs = True

    def _to_groups(self, dataset: Dataset) -> Dataset:
        return scored_pairs(dataset)
