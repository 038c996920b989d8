"""The keys of the script around the training."""

from dataclasses import dataclass, field


@dataclass
class RunConfig:
    """Settings of the script around the training.

    Attributes:
        given: Keys that the recipe or the command line sets, each with the flags that set it.
    """

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of one optimizer step, over all processes. gradient_accumulation_steps follows from it, "
            "and with max_tokens_per_forward per_device_train_batch_size too, unless that key is set as well."
        },
    )
    show_batch: bool = field(
        default=False, metadata={"help": "Print one tokenized group, decoded, with its mask, and stop."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove an earlier run's files from output_dir, and start anew."}
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "FILE.py:NAME of a function (prompts, completions, **columns) -> scores. With it, the model is "
            "sampled before and after training on the held-out prompts, and the scores are compared."
        },
    )
    num_eval_samples: int = field(default=4, metadata={"help": "Samples drawn for each held-out prompt."})
    max_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts to sample from, at most."})
    eval_prompts_in_training: int | None = field(
        default=None,
        metadata={
            "help": "Held-out prompts of the evaluations during training: the first so many. The evaluation at the end "
            "takes all. None: all of them each time."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a sample."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy."})
    samples_before_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the samples before training for later runs with the same model, prompts, "
            "number, length, temperature and seed, as those of a sweep. None: they are not kept."
        },
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print the run's batch, steps and memory, write them to output_dir/plan.json, and "
            "stop. Needs neither weights nor GPU."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "With plan: number of processes, one a GPU. None: as many as were launched."},
    )
    gpu_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "With plan: memory of a GPU, in GB (1e9 bytes). None: that of the GPU here or of gpu, of this "
            "machine where the recipe says use_cpu, else 80; for gradient_checkpointing: auto, what is free of it."
        },
    )
    gpu: str | None = field(
        default=None,
        metadata={
            "help": "With plan: the GPU to estimate hours for, such as H100 or 'RTX 4090', whose memory is then the "
            "default of gpu_memory_gb. None: the GPU here, else H100, but none with gpu_memory_gb."
        },
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "With plan: a config.json to plan for in place of the model's, where the model is not at hand."
        },
    )
    parallel: str | None = field(
        default=None,
        metadata={
            "help": "With plan: how the run is parallelized. None: as it was launched.",
            "choices": ["ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload"],
        },
    )
    num_prompts: int | None = field(
        default=None,
        metadata={"help": "With plan: rows to plan for, where the data is not at hand. None: those of the data."},
    )
    given: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.plan and self.num_processes is not None:
            raise ValueError(
                f"num_processes: only a plan can ask for {self.num_processes} processes (--plan); to run on as many, "
                f"launch with `accelerate launch --num_processes={self.num_processes}`"
            )
        for key in ("num_processes", "gpu_memory_gb", "num_prompts", "eval_prompts_in_training"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"{key}: must be above 0, got {getattr(self, key)}")


#: Keys of `--plan`, which describe one launch and not the run.
PLAN_KEYS = ("plan", "num_processes", "gpu_memory_gb", "gpu", "model_config", "parallel", "num_prompts")
