"""Summed log-probs of K responses to each prompt, by packed groups or by padded rows.

Legend: B prompts, K responses, N real responses in the batch, T packed tokens, R response tokens, L longest response,
V vocabulary. The batch is that of `GroupCollator`.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trl_nca.head import fuse_head
from trl_nca.layers import fuse_layers
from trl_nca.layout import GroupLayout, padded_inputs
from trl_nca.router import RouterLoss
from trl_nca.self_check import Probe, evaluating
from trl_nca.shared_prompt import NAME, CannotShare
from trl_nca.sharing import Attention, base_model, share_prompts, unshare_prompts
from trl_nca.token_metrics import TokenMetrics

Batch = dict[str, Any]  # tensors, the layout, and the rows' locations


def prepare(models: Sequence[nn.Module], shared_prompt: str = "auto", check: bool = True) -> bool:
    """Patches models in place so that `response_logps` can run them. Sampling, and any other use, is as before.

    Args:
        models: Policy and, where it is a model of its own, reference; bare or wrapped by PEFT.
        shared_prompt: "true", "false", or "auto": true where the models can, else a warning.
        check: Hold the log-probs of a few short rows against those of each model's own plain forward: a model whose
            packed rows are wrong cannot share prompts.

    Returns:
        What to pass to `response_logps` as `shared_prompt`.

    Raises:
        ValueError: "true" was asked for and a model cannot, or its padded rows are wrong too; says why.
    """
    with contextlib.ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(evaluating(model))
        probes = [_run(model, Probe, model) for model in models] if check else []
        for model in models:
            _patch(model)
        shares = shared_prompt != "false" and _share(models, probes, shared_prompt == "true")
        for model, probe in zip(models, probes, strict=False):
            reason = None if shares else probe.compare(_run(model, response_logps, model, probe.batch, False))
            if reason:
                raise ValueError(f"{_name(model)} cannot be trained on: {reason}")
    return shares


def _run(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Calls what runs the model; whatever its family's code says of a few plain rows is why it cannot be trained."""
    try:
        return function(*args)
    except Exception as error:
        raise ValueError(f"{_name(model)} cannot be trained on: {_words(error)}") from error


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _name(model: nn.Module) -> str:
    return type(base_model(model)).__name__


def _patch(model: nn.Module) -> None:
    base = base_model(model)
    fuse_head(base)
    fuse_layers(model)
    for wrapper in model.modules():  # PEFT's adaption prompts keep the forward of the model that they wrap
        if wrapper is not base and getattr(wrapper.__dict__.get("forward"), "__self__", None) is base:
            wrapper.forward = base.forward


def _share(models: Sequence[nn.Module], probes: Sequence[Probe], required: bool) -> bool:
    """Makes models run packed groups, if all of them can."""
    before: Attention = []
    try:
        before = share_prompts(models)
        for model, probe in zip(models, probes, strict=False):
            if reason := probe.compare(response_logps(model, probe.batch, True)):
                raise CannotShare(reason)
    except Exception as error:  # whatever a family's code says of a row that it does not expect
        unshare_prompts(before)
        if required:
            raise ValueError(
                f"shared_prompt: this model cannot share prompts: {_words(error)}; set it to auto or false"
            ) from error
        warnings.warn(f"Prompts are not shared and rows are padded: {_words(error)}", stacklevel=3)
        return False
    return True


def response_logps(
    model: nn.Module,
    batch: Batch,
    shared_prompt: bool,
    router: RouterLoss | None = None,
    token_metrics: TokenMetrics | None = None,
) -> Tensor:
    r"""Log-prob of each response given its prompt, summed over the response's tokens.

    .. math:: \log \pi(y | x) = \sum_t \log \pi(y_t | x, y_{<t})

    Args:
        model: A causal language model after `prepare`, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        batch: Packed groups from `GroupCollator`. With a number under `temperature`, log-probs are those of
            softmax(logits / temperature).
        shared_prompt: What `prepare` returned. True: run packed, each prompt once. False: every response is run in
            a padded row of its own, behind its own copy of the prompt.
        router: Where it is enabled, the load-balancing loss of this forward is added to it.
        token_metrics: Where this forward counts, the statistics of its tokens are added to it.

    Returns:
        Log-probs in nats, float32 or wider, 0 for padded responses. Shape (B, K). Where the batch has `token_weights`,
        the sums are of weighted tokens.
    """
    inputs = model_inputs(batch, shared_prompt)
    with_router = router is not None and router.enabled
    with_tokens = token_metrics is not None and token_metrics.enabled
    inputs |= {"output_router_logits": True} if with_router else {}
    inputs |= {"token_statistics": True} if with_tokens else {}
    with _without_padding_masks():
        outputs = model(**inputs)
    per_token_logps, *beside = outputs if with_router or with_tokens else (outputs,)  # (R,)
    if with_router:
        router.add(batch, beside.pop())
    if with_tokens:
        token_metrics.add(batch, beside.pop())
    if "token_weights" in batch:
        per_token_logps = per_token_logps * batch["token_weights"]
    response_index = _layout(batch).response_index  # (R,)
    logps = per_token_logps.new_zeros(batch["scores"].numel()).index_add(0, response_index, per_token_logps)
    return logps.view(batch["scores"].shape)


@contextlib.contextmanager
def _without_padding_masks() -> Iterator[None]:
    """Masks are made without a look at the padding, for which transformers would wait for the device.

    Rows are padded on the right, where no real token of a causal model looks.
    """
    before = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in _UNPADDED}
    try:
        ALL_MASK_ATTENTION_FUNCTIONS.update(_UNPADDED)
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.update(before)


def _unpadded(make_mask: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    return make_mask(*args, **kwargs | {"attention_mask": None})


#: The same functions at each step: for others a compiled model would be compiled again.
_UNPADDED = {name: functools.partial(_unpadded, ALL_MASK_ATTENTION_FUNCTIONS[name]) for name in (NAME, "sdpa")}


def model_inputs(batch: Batch, shared_prompt: bool) -> dict[str, Any]:
    """Keyword arguments of the patched model's forward for a batch. For the arguments see `response_logps`."""
    inputs = (_packed if shared_prompt else _padded)(batch)
    if "temperature" in batch:
        inputs["temperature"] = batch["temperature"]
    return inputs | {"targets": batch["targets"], "use_cache": False}


def _layout(batch: Batch) -> GroupLayout:
    """The layout of the batch, with its tensors where the tokens are."""
    return batch["layout"].to(batch["input_ids"].device)


def _packed(batch: Batch) -> dict[str, Any]:
    """All groups in one row. `positions`, shape (R,), are those in it that predict the targets."""
    layout = _layout(batch)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": torch.ones(1, 1, dtype=torch.long, device=layout.device),  # see `shared_prompt_mask`
        "group_layout": layout,
        "positions": layout.target_positions,
        "row_length": batch["input_ids"].shape[1],
    }


def _padded(batch: Batch) -> dict[str, Any]:
    """One padded row a response."""
    return padded_inputs(batch["input_ids"][0], batch["layout"])
