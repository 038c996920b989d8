"""Sample responses to chat prompts, many at a time.

B prompts in a batch, S samples of each, L tokens of the longest prompt in the batch.
"""

import torch
from tqdm.auto import tqdm

Messages = list[dict[str, str]]


def sample_responses(
    model,
    tokenizer,
    prompts: list[Messages],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    desc: str = "Sampling",
) -> list[list[str]]:
    """Samples `num_samples` responses to each prompt; leaves the model's mode and the random state as they were.

    Each prompt is read once for all its samples: on a CPU a token read costs about as much as a token written.

    Args:
        model: Causal language model, plain or wrapped by PEFT.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Conversations that end with the user's turn.
        num_samples: Samples of each prompt, S.
        max_new_tokens: Longest response, in tokens.
        temperature: 0 takes the likeliest token at every step, so all samples of a prompt are equal.
        top_p: Share of the probability mass to sample from.
        batch_size: Responses written at once; at least the samples of one prompt.
        seed: The same seed, batch size and machine give the same responses.
        desc: Label of the progress bar.

    Returns:
        `num_samples` texts for each prompt, in the order of the prompts, without special tokens.
    """
    prompt_ids = [_prompt_ids(tokenizer, messages) for messages in prompts]
    # Neighbours in length share a batch, so little is padded; the longest first, so that memory runs out at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    num_prompts = max(1, batch_size // num_samples)
    settings = _generation_settings(model, tokenizer, max_new_tokens, temperature, top_p)
    responses: list[list[str]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()  # this also rests gradient checkpointing, which would forbid the key cache
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), tqdm(total=len(prompts), desc=desc) as progress:
            torch.manual_seed(seed)
            for start in range(0, len(order), num_prompts):
                batch = order[start : start + num_prompts]
                tokens = _sample_batch(model, [prompt_ids[i] for i in batch], num_samples, settings)
                texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for row, i in enumerate(batch):
                    responses[i] = texts[row * num_samples : (row + 1) * num_samples]
                progress.update(len(batch))
    finally:
        model.train(was_training)
    return responses


def _sample_batch(model, prompt_ids: list[list[int]], num_samples: int, settings: dict) -> torch.Tensor:
    """Returns the sampled tokens, prompt-major. Shape (B * S, longest response)."""
    length = max(map(len, prompt_ids))
    padding = [[settings["pad_token_id"]] * (length - len(ids)) for ids in prompt_ids]
    input_ids = torch.tensor([pad + ids for pad, ids in zip(padding, prompt_ids, strict=True)], device=model.device)
    is_real = [[0] * len(pad) + [1] * (length - len(pad)) for pad in padding]
    attention_mask = torch.tensor(is_real, device=model.device)  # (B, L)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
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


def _generation_settings(model, tokenizer, max_new_tokens: int, temperature: float, top_p: float) -> dict:
    """Returns the arguments of `generate`; each default of the model's that would bend the distribution is off."""
    stops = model.generation_config.eos_token_id
    # A base model with a chat template stops at the template's token, which its own configuration need not know.
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(stops),
        "pad_token_id": pad,
        "use_cache": True,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return settings


def _prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Returns the token ids of the prompt, up to where the assistant begins to speak."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
