"""Samples responses to chat prompts, many at a time.

Every batch has its own seed, so that work which was stopped can resume with the next batch and give the same result.
 B prompts in a batch, S samples of each, L tokens of the longest prompt in the batch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from alignment.data.row import Messages, Row
from alignment.errors import UserError
from alignment.input_limits import check_input, input_limits
from trl_nca.rendering.messages import RefusedRow
from trl_nca.responses import ResponseTokenizer
from trl_nca.stops import stop_tokens


class Sample(NamedTuple):
    """A response, without special tokens, and whether the model ended it itself (and not `max_new_tokens`)."""

    text: str
    finished: bool


class Drawn(NamedTuple):
    """A response as text, without special tokens, and as the tokens that were drawn, with the one that ended it."""

    text: str
    ids: list[int]


#: Other keys of a model's generation config that shape the distribution of tokens, at what leaves it as it is.
_NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "min_p": None, "top_h": None,
            "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
        num_samples: Samples of each prompt, S.
        max_new_tokens: Longest response, in tokens.
        temperature: 0 takes the likeliest token at every step, so all samples of a prompt are equal.
        top_p: Share of the probability mass to sample from.
        batch_size: Responses written at once; at least the samples of one prompt.
        seed: Batch i has the seed `seed + i`. The same seed, batch size and machine give the same responses.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--temperature must be at least 0 and --top_p above 0 and at most 1, got {self.temperature} and "
                f"{self.top_p}"
            )

    def batches(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Indices of the prompts, batch by batch.

        Neighbours in length share a batch, so little is padded; the longest first, so that memory runs out at once.
        """
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
        num_prompts = max(1, self.batch_size // self.num_samples)
        return [order[start : start + num_prompts] for start in range(0, len(order), num_prompts)]


def sample_responses(
    model, tokenizer, prompts: list[Row], desc: str = "Sampling", **settings: Any
) -> list[list[Drawn]]:
    """Samples responses to each prompt; leaves the model's mode and the random state as they were.

    Args:
        model: Causal language model, plain or wrapped by PEFT.
        tokenizer: Its tokenizer.
        prompts: Rows; see `encode_row`.
        desc: Label of the progress bar.
        **settings: Fields of `SamplingConfig`.

    Returns:
        S responses to each prompt, in the order of the prompts.
    """
    config = SamplingConfig(**settings)
    prompt_ids = [encode_row(tokenizer, row) for row in prompts]
    stops = stop_tokens(tokenizer, model.generation_config)
    responses: list[list[Drawn]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=desc) as progress:
        for index, batch in enumerate(config.batches(prompt_ids)):
            samples = draw_batch([prompt_ids[i] for i in batch], index, model, tokenizer, config)
            for i, drawn in zip(batch, samples, strict=True):
                responses[i] = [Drawn(read_sample(ids, tokenizer, stops).text, ids) for ids in drawn]
            progress.update(len(batch))
    return responses


def sample_batch(
    prompt_ids: list[list[int]], index: int, model, tokenizer, config: SamplingConfig
) -> list[list[Sample]]:
    """Samples of one batch as texts. For arguments and errors see `draw_batch`."""
    stops = stop_tokens(tokenizer, model.generation_config)
    drawn = draw_batch(prompt_ids, index, model, tokenizer, config)
    return [[read_sample(ids, tokenizer, stops) for ids in of_prompt] for of_prompt in drawn]


def draw_batch(
    prompt_ids: list[list[int]], index: int, model, tokenizer, config: SamplingConfig
) -> list[list[list[int]]]:
    """Samples of one batch, by transformers; leaves the model's mode and the random state as they were.

    Each prompt is read once for all its samples: on a CPU a token read costs about as much as a token written.

    Args:
        prompt_ids: Token ids of B prompts.
        index: Index of the batch; with `config.seed` it gives the batch's seed.
        model, tokenizer, config: See `sample_responses`.

    Returns:
        For each of the B prompts the token ids of S samples, with the one that ended them, without padding.

    Raises:
        UserError: The model cannot read a prompt, or has no positions for its samples.
    """
    limits = input_limits(model)
    for ids in prompt_ids:
        check_input(limits, ids, config.max_new_tokens, f"a prompt for {model.name_or_path}", "lower --max_new_tokens")
    settings = generation_settings(model, tokenizer, config)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()  # this also rests gradient checkpointing, which would forbid the key cache
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(config.seed + index)
            tokens = _generate(model, prompt_ids, config.num_samples, settings)
    finally:
        model.train(was_training)
    samples = [_until_stop(ids, settings["eos_token_id"] or []) for ids in tokens.tolist()]
    return [samples[start : start + config.num_samples] for start in range(0, len(samples), config.num_samples)]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Token ids without the padding behind the token that ends them."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def read_sample(ids: list[int], tokenizer, stops: list[int] | None) -> Sample:
    """A response from its token ids: without the token that ended it, and the padding behind."""
    end = next((i for i, token in enumerate(ids) if token in (stops or ())), None)
    return Sample(tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)


def encode_row(tokenizer, row: Row, location: str = "") -> list[int]:
    """Token ids that sampling starts from for a row.

    Args:
        tokenizer: Of the model.
        row: `prompt`, a conversation that ends with a turn of the user's or a tool's; where the row has them, `tools`
            and `chat_template_kwargs`.
        location: Of the row, which errors name.

    Raises:
        UserError: See `encode_prompt`.
    """
    try:
        return encode_prompt(tokenizer, row["prompt"], row.get("tools"), row.get("chat_template_kwargs"))
    except UserError as error:
        raise UserError(f"{location}: {error}") if location else error from error


def encode_prompt(tokenizer, messages: Messages, tools: Any = None, chat_template_kwargs: Any = None) -> list[int]:
    """Token ids that sampling starts from; see `trl_nca.responses.ResponseTokenizer.encode_prompt`.

    Raises:
        UserError: The tokenizer has no chat template for several messages, or its template refuses them.
    """
    if tokenizer.chat_template is None and len(messages) > 1:
        raise UserError(
            f"chat_template: the tokenizer of {tokenizer.name_or_path} has none, so that it can be given one message "
            f"and not {len(messages)}; put a chat_template.jinja into its folder"
        )
    try:
        return ResponseTokenizer(tokenizer).encode_prompt(messages, tools, chat_template_kwargs)
    except RefusedRow as refused:
        name = tokenizer.name_or_path
        raise UserError(f"the chat template of {name} refuses the prompt: {refused.detail}") from refused


def _generate(model, prompt_ids: list[list[int]], num_samples: int, settings: dict[str, Any]) -> torch.Tensor:
    """Samples tokens, prompt-major. Shape (B * S, longest response)."""
    length = max(map(len, prompt_ids))
    padding = [[settings["pad_token_id"]] * (length - len(ids)) for ids in prompt_ids]
    input_ids = torch.tensor([pad + ids for pad, ids in zip(padding, prompt_ids, strict=True)], device=model.device)
    is_real = [[0] * len(pad) + [1] * (length - len(pad)) for pad in padding]
    attention_mask = torch.tensor(is_real, device=model.device)  # (B, L)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    if length > 1:
        # All but the last token: `generate` wants at least one that is not in the cache.
        cache = model(
            input_ids=input_ids[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=position_ids[:, :-1],
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_repeat_interleave(num_samples)
    sequences = model.generate(
        input_ids=input_ids.repeat_interleave(num_samples, dim=0),  # (B * S, L)
        attention_mask=attention_mask.repeat_interleave(num_samples, dim=0),
        past_key_values=cache,
        **settings,
    )
    return sequences[:, length:]


def generation_settings(model, tokenizer, config: SamplingConfig) -> dict[str, Any]:
    """Arguments of `generate`, without the model's defaults that would change the distribution."""
    padding = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]  # any will do: padding is masked, and cut off
    settings = {
        "max_new_tokens": config.max_new_tokens,
        "eos_token_id": stop_tokens(tokenizer, model.generation_config) or None,
        "pad_token_id": next(token for token in padding if token is not None),
        "use_cache": True,
        "do_sample": config.temperature > 0,
        **_NEUTRAL,
    }
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return settings
