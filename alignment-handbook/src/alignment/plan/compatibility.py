"""Combinations of recipe and launch that do not work. Each was tried with the pinned versions.

torch 2.13, bitsandbytes 0.50, accelerate 1.15, DeepSpeed 0.19.8.
"""

from transformers import TrainingArguments

from alignment.errors import UserError
from alignment.launch import launched_layout, launched_sequence_parallelism
from alignment.models import PolicyConfig
from alignment.plan.layouts import BITSANDBYTES, optimizer_name

#: Optimizers in whose place an offloaded step of DeepSpeed is that of its own AdamW.
_OFFLOADED = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")


def incompatibilities(policy: PolicyConfig, args: TrainingArguments, layout: str) -> list[dict[str, str]]:
    """What in a recipe a layout does not support: each with `what`, `reason` and `fix`."""
    found = []

    def add(what: str, reason: str, fix: str) -> None:
        found.append({"what": what, "reason": reason, "fix": fix})

    engine, _, offload = layout.partition("_")
    if engine == "fsdp2":
        # bitsandbytes::optimizer_update_32bit: "does not have a sharding strategy registered" for DTensor.
        if optimizer_name(args) in BITSANDBYTES:
            add(
                f"optim: {optimizer_name(args)} with fsdp2",
                "bitsandbytes' optimizers do not take sharded weights",
                "--optim=adamw_torch",
            )
        # Linear8bitLt.forward reads weight.CB, which the sharded parameter has not.
        if policy.load_in_8bit:
            add(
                "load_in_8bit with fsdp2",
                "8-bit weights lose their scales when they are sharded",
                "load_in_4bit with fsdp2_qlora.yaml, or multi_gpu.yaml",
            )
        # The gathered bytes are cast to MixedPrecisionPolicy.param_dtype as if they were numbers of that type.
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        storage = policy.bnb_4bit_quant_storage
        if policy.load_in_4bit and compute and storage not in (None, "uint8", compute):
            add(
                f"bnb_4bit_quant_storage: {storage} with fsdp2",
                f"the 4-bit weights' bytes would be cast to {compute} when they are gathered, and be lost",
                f"--bnb_4bit_quant_storage={compute}",
            )
    # accelerate's map_pytorch_optim_to_deepspeed puts DeepSpeed's own Adam in the place of any, and of these its AdamW.
    if engine in ("zero2", "zero3") and offload and optimizer_name(args) not in _OFFLOADED:
        add(
            f"optim: {optimizer_name(args)} with {layout}",
            "an offloaded step is made by DeepSpeed's own Adam, without its decoupled weight decay for this one",
            "--optim=adamw_torch",
        )
    if engine == "zero3" and (policy.load_in_4bit or policy.load_in_8bit):
        bits = "load_in_4bit" if policy.load_in_4bit else "load_in_8bit"
        # transformers' from_pretrained: zero.Init only where `is_deepspeed_zero3_enabled() and not is_quantized`. On
        # two processes deepspeed.initialize then does not return, where it does for the same model in bfloat16.
        add(
            f"{bits} with zero3",
            "transformers loads quantized weights outside ZeRO-3's partitions, and DeepSpeed hangs on them",
            "fsdp2_qlora.yaml, deepspeed_zero2.yaml or multi_gpu.yaml",
        )
    return found


def sharded_sequences() -> list[dict[str, str]]:
    """Whether the launch shards each sequence over processes, as `incompatibilities` says it.

    It is no layout: a plan shows what a whole sequence takes on each process.
    """
    # transformers' Trainer._prepare_context_parallel_inputs wants "sdpa" and a causal mask, and splits `input_ids` and
    # `labels` of the batch; accelerate's UlyssesSPDataLoaderAdapter splits these too. A batch here has a layout.
    reason = (
        "it shards causal sequences, and a packed row is none, because responses do not see each other; nor is a "
        "response's log-prob summed over processes"
    )
    fix = "max_tokens_per_forward, by which each process runs a long response in pieces, and a launch without it"
    found = launched_sequence_parallelism()
    return [{"what": f"{name}: {size}", "reason": reason, "fix": fix} for name, size in found.items()]


def check_layout(policy: PolicyConfig, args: TrainingArguments) -> None:
    """Ends a run whose recipe its launch cannot do, before anything is loaded.

    Raises:
        UserError: Names the combination, the reason and the fix.
    """
    for found in sharded_sequences() + incompatibilities(policy, args, launched_layout(args.world_size)):
        raise UserError(f"{found['what']}: {found['reason']}; use {found['fix']}")
