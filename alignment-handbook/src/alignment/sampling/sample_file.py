"""Samples responses to the prompts of a file, with transformers or vLLM, batch by batch, and writes rows of them."""

import gc
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from tqdm.auto import tqdm

from alignment.errors import UserError
from alignment.models import adapter_base, load_trained_model, load_trained_tokenizer, local_adapter
from alignment.resumable import Entry, PartFile, content_hash, fingerprint
from alignment.sampling.prompts import Row, read_prompts
from alignment.sampling.sample import Sample, SamplingConfig, encode_row, sample_batch
from trl_nca.stops import stop_tokens

#: Columns of a row that belong to its old responses.
_OF_RESPONSES = ("responses", "sources", "scores", "score_parts")

Sampler = Callable[[list[list[int]], int], list[list[Sample]]]


def sample_file(
    path: str,
    models: list[str],
    output: str,
    config: SamplingConfig,
    *,
    finished_only: bool = False,
    engine: str = "transformers",
    dtype: str = "auto",
    base: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes rows of prompt, responses and sources: S responses of each model to each prompt of a file.

    A run that was killed resumes where it stopped, and gives the file of an uninterrupted one, byte for byte.

    Args:
        path: See `read_prompts`. Other columns are copied, except those of older responses; `tools` and
            `chat_template_kwargs` reach the chat template.
        models: Folders or Hub ids; adapters' folders too.
        output: A `.jsonl`. Rows are in the order of the prompts; responses are without white space around them.
        config: How responses are sampled.
        finished_only: Leave out responses that ran into `max_new_tokens`; a row may then have fewer, or none.
        engine: "transformers" or "vllm".
        dtype: Type of the weights, "auto" as they were saved.
        base: The base of adapters, in place of the one that they name.
        overwrite: Replace `output`.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: See `read_prompts`, `PartFile`, `load_trained_tokenizer` and `_encode_prompts`.
    """
    rows, locations = read_prompts(path)
    header = {"prompts": content_hash(rows), "models": [[name, fingerprint(name)] for name in models]}
    part = PartFile(output, header | {"engine": engine, "dtype": dtype} | asdict(config), overwrite)
    prompt_ids = [_encode_prompts(name, base, rows, locations, config.max_new_tokens) for name in models]
    done = {entry["batch"] for entry in part.entries}
    num_done = sum(len(entry["rows"]) for entry in part.entries)
    with tqdm(total=len(models) * len(rows), initial=num_done, desc="Sampling", unit="prompt") as progress:
        first = 0
        for name, ids in zip(models, prompt_ids, strict=True):
            batches = dict(enumerate(config.batches(ids), start=first))
            first += len(batches)
            for entry in _sample_batches(name, base, ids, batches, done, config, engine, dtype):
                part.add(entry)
                progress.update(len(entry["rows"]))
    entries = sorted(part.entries, key=lambda entry: entry["batch"])  # model by model
    part.finish(_join(rows, entries, finished_only))
    return _summary(output, rows, entries, finished_only)


def choose_engine(name: str) -> str:
    """Chooses the engine: for "auto" vLLM where it is installed.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not has_vllm:
        raise UserError("--engine: vllm is not installed; pip install vllm, or --engine transformers")
    return name if name != "auto" else "vllm" if has_vllm else "transformers"


def vllm_sampler(name: str, tokenizer, config: SamplingConfig, dtype: str, base: str | None = None) -> Sampler:
    """Loads a model, or an adapter on its base, into vLLM.

    Returns:
        A function of prompts' token ids and the index of the batch, which gives S samples of each prompt.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    named, folder = adapter_base(name), local_adapter(name)
    adapter, lora = None, {}
    if named is not None:
        adapter = LoRARequest("adapter", 1, folder)
        lora = {"enable_lora": True, "max_lora_rank": _max_lora_rank(folder)}
    llm = LLM(model=(base or named) if named else name, tokenizer=tokenizer.name_or_path, dtype=dtype, **lora)
    stops = stop_tokens(tokenizer)
    is_greedy = config.temperature == 0  # for which vLLM allows one sample only

    def sample(prompt_ids: list[list[int]], index: int) -> list[list[Sample]]:
        rng = random.Random(config.seed + index)
        params = [
            SamplingParams(
                n=1 if is_greedy else config.num_samples,
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens,
                stop_token_ids=stops,  # which a base model's configuration, read by vLLM, need not know
                seed=rng.getrandbits(31),
            )
            for _ in prompt_ids
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
        drawn = [[Sample(o.text, o.finish_reason == "stop") for o in output.outputs] for output in outputs]
        return [samples * config.num_samples for samples in drawn] if is_greedy else drawn

    return sample


def _max_lora_rank(name: str) -> int:
    """The smallest rank vLLM reserves memory for that is at least the adapter's."""
    from peft import PeftConfig

    rank = PeftConfig.from_pretrained(name).r
    return next(size for size in (16, 32, 64, 128, 256, 320, 512) if size >= rank)


def _encode_prompts(
    name: str, base: str | None, rows: list[Row], locations: list[str], max_new_tokens: int
) -> list[list[int]]:
    tokenizer, max_positions = load_trained_tokenizer(name, base)
    encoded = []
    for row, location in zip(rows, locations, strict=True):
        encoded.append(encode_row(tokenizer, row, location))
        if max_positions is not None and len(encoded[-1]) + max_new_tokens > max_positions:
            raise UserError(
                f"{location}: the prompt has {len(encoded[-1])} tokens, and with --max_new_tokens {max_new_tokens} "
                f"more than the {max_positions} of {name}; remove the row, or lower --max_new_tokens"
            )
    return encoded


def _sample_batches(
    name: str,
    base: str | None,
    prompt_ids: list[list[int]],
    batches: dict[int, list[int]],
    done: set[int],
    config: SamplingConfig,
    engine: str,
    dtype: str,
) -> Iterator[Entry]:
    """Entries of a model's batches that are not done yet; the model is loaded if there are any, and freed after."""
    missing = [index for index in batches if index not in done]
    if not missing:
        return
    tokenizer, _ = load_trained_tokenizer(name, base)
    if engine == "vllm":
        sample = vllm_sampler(name, tokenizer, config, dtype, base)
    else:
        sample = partial(sample_batch, model=load_trained_model(name, dtype, base), tokenizer=tokenizer, config=config)
    for index in missing:
        samples = sample([prompt_ids[i] for i in batches[index]], index)
        yield {"batch": index, "model": name, "rows": batches[index], "samples": samples}
    del sample
    gc.collect()  # the next model may need the memory


def _join(rows: list[Row], entries: list[Entry], finished_only: bool) -> Iterator[Row]:
    drawn: list[list[tuple[str, str]]] = [[] for _ in rows]  # responses and their models
    for entry in entries:
        for i, samples in zip(entry["rows"], entry["samples"], strict=True):
            drawn[i] += [(text.strip(), entry["model"]) for text, finished in samples if finished or not finished_only]
    for row, kept in zip(rows, drawn, strict=True):
        responses, sources = [text for text, _ in kept], [model for _, model in kept]
        carried = {name: value for name, value in row.items() if name not in ("prompt", *_OF_RESPONSES)}
        yield {"prompt": row["prompt"], "responses": responses, "sources": sources, **carried}


def _summary(output: str, rows: list[Row], entries: list[Entry], finished_only: bool) -> str:
    finished = [finished for entry in entries for samples in entry["samples"] for _, finished in samples]
    cut = len(finished) - sum(finished)
    return (
        f"{output}: {len(rows)} prompts, {len(finished)} responses; {cut} of them ran into max_new_tokens and were "
        f"{'left out' if finished_only else 'kept'}"
    )
