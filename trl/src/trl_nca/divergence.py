r"""How far a policy has moved from its reference: their log-probs of responses that the policy has drawn.

The mean of log-ratios over the policy's own samples estimates the divergence

.. math:: \mathrm{KL}(\pi \| \pi_{ref}) = E_{y \sim \pi(\cdot|x)} \big[\log \pi(y|x) - \log \pi_{ref}(y|x)\big]

of what is really sampled: responses up to the longest that was allowed, at the temperature that they were drawn at.
The estimator is unbiased, whatever the number of samples; it is not bounded by zero, as the divergence is: where the
policy has hardly moved, the mean of a few samples may be below it.
"""

from tqdm.auto import tqdm
from trl import DPOTrainer

from trl_nca.chunks import logps_without_gradient
from trl_nca.self_check import evaluating


def why_no_divergence(trainer: DPOTrainer, temperature: float) -> str | None:
    """Why the divergence of a trained policy cannot be measured, in words; None where it can.

    Args:
        trainer: An `NCATrainer`.
        temperature: Of the samples.
    """
    if temperature == 0:
        return "at temperature 0 there is one response to each prompt, and no distribution of them"
    if trainer.args.sync_ref_model:
        return "the reference has moved (sync_ref_model)"
    if trainer.ref_model is None and trainer._adapter_reference is None:
        return "no reference is kept (precompute_ref_log_probs, or none in the loss, without an adapter)"
    return None


def response_logratios(
    trainer: DPOTrainer,
    prompt_ids: list[list[int]],
    response_ids: list[list[list[int]]],
    temperature: float = 1.0,
) -> list[list[float]]:
    r"""Log-ratios \(\log \pi(y|x) - \log \pi_{ref}(y|x)\) of responses, by the trainer's engine; no gradient is kept.

    One prompt with its responses is run at a time, in chunks of `max_tokens_per_forward`. It is run by the process that
    asks, so that weights must not be sharded.

    Args:
        trainer: An `NCATrainer`, with a reference: see `why_no_divergence`.
        prompt_ids: Token ids of the prompts, as they were sampled from.
        response_ids: For each prompt the token ids of its responses as they were drawn, with the end of a response
            where the policy ended it.
        temperature: What they were drawn at: both distributions are softmax(logits / temperature). Above 0.

    Returns:
        For each prompt a number for each of its responses, in nats.
    """
    models = (trainer.model, trainer.ref_model or trainer.model)
    policy, ref = (trainer.accelerator.unwrap_model(model) for model in models)
    found = []
    rows = list(zip(prompt_ids, response_ids, strict=True))
    for prompt, responses in tqdm(rows, desc="Log-ratios of the samples"):
        row = {"prompt_ids": prompt, "response_ids": responses, "scores": [0.0] * len(responses)}
        batch = trainer._prepare_inputs(trainer.data_collator([row])) | {"temperature": temperature}
        batch.pop("token_weights", None)  # of the loss
        with evaluating(policy):
            logps = logps_without_gradient(trainer._logps_fn(policy), *trainer._chunks(batch))  # (1, K)
        ref_logps = trainer.compute_ref_log_probs(ref, batch)
        found.append((logps - ref_logps)[0].tolist())
    return found
