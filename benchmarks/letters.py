"""A task small enough for hundreds of runs: a model of a hundred thousand weights that writes letters.

A prompt is four letters, `c f k q`. The reference policy has learned to answer with some letters of the alphabet, now
and then one of the prompt's. The score of an answer is the share of its letters that are of the prompt, and not the
same as the one before; its expectation does not depend on the length of the answer:

>>> letters_score(["c f k q"], ["f k k z"])
[0.5]
"""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase[:20]
SPECIAL = ["<pad>", "</s>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
#: Letters of an answer, at least and at most; shares of them that are of the prompt, and that follow in the alphabet.
SHORTEST, LONGEST, OF_PROMPT, NEXT = 5, 12, 0.2, 0.3
#: Prompts of the two files, and answers to each.
NUM_TRAIN, NUM_EVAL, NUM_ANSWERS, NUM_EVAL_ANSWERS = 512, 200, 16, 8


def letters_score(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Scores answers; has the signature of TRL's reward functions.

    Args:
        prompts, completions: Texts, or messages. As many of one as of the other.
        **columns: Not needed.

    Returns:
        Of each answer the share of its letters that are of the prompt and not the same as the one before.
    """
    return [_score(_text(prompt), _text(answer)) for prompt, answer in zip(prompts, completions, strict=True)]


def _score(prompt: str, answer: str) -> float:
    letters = answer.split()
    good = sum(b in prompt.split() and a != b for a, b in zip(["", *letters], letters, strict=False))
    return good / max(1, len(letters))


def _text(text_or_messages: str | list[dict[str, str]]) -> str:
    return text_or_messages if isinstance(text_or_messages, str) else text_or_messages[-1]["content"]


def make_task(folder: Path) -> None:
    """Trains the reference policy, and samples its answers: `model/`, `train.jsonl`, `eval.jsonl`. Takes a minute.

    Args:
        folder: Where to. What is there already is left.
    """
    if (folder / "eval.jsonl").exists():
        return
    rng = random.Random(0)
    torch.manual_seed(0)
    tokenizer, policy = _tokenizer(), _train(rng, steps=600)
    policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = list(_prompts(rng, NUM_TRAIN + NUM_EVAL))
    files = {"train": (prompts[:NUM_TRAIN], NUM_ANSWERS), "eval": (prompts[NUM_TRAIN:], NUM_EVAL_ANSWERS)}
    for name, (of_file, count) in files.items():
        answers = _answers(policy, tokenizer, of_file, count)
        rows = [_row(prompt, texts) for prompt, texts in zip(of_file, answers, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(prompt: str, answers: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "responses": answers, "scores": letters_score([prompt] * len(answers), answers)}


def _prompts(rng: random.Random, count: int) -> Iterator[str]:
    """Different sets of four letters."""
    found: set[frozenset[str]] = set()
    while len(found) < count:
        letters = rng.sample(LETTERS, 4)
        if frozenset(letters) not in found:
            found.add(frozenset(letters))
            yield " ".join(letters)


def _example(rng: random.Random) -> tuple[list[str], list[str]]:
    """A prompt and an answer, as the reference policy is to give them."""
    prompt, answer = rng.sample(LETTERS, 4), [rng.choice(LETTERS)]
    for _ in range(rng.randint(SHORTEST, LONGEST) - 1):
        draw = rng.random()
        following = LETTERS[(LETTERS.index(answer[-1]) + 1) % len(LETTERS)]
        others = rng.choice(LETTERS) if draw > OF_PROMPT + NEXT else following
        answer.append(rng.choice(prompt) if draw < OF_PROMPT else others)
    return prompt, answer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *LETTERS])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE,
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip


def _train(rng: random.Random, steps: int) -> LlamaForCausalLM:
    """Next-token training on examples, from random weights."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    policy, ids = LlamaForCausalLM(config), {word: i for i, word in enumerate([*SPECIAL, *LETTERS])}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        examples = [_example(rng) for _ in range(128)]
        texts = [["<user>", *prompt, "</s>", "<assistant>", *answer, "</s>"] for prompt, answer in examples]
        width = max(map(len, texts))
        rows = torch.tensor([[ids[word] for word in text] + [0] * (width - len(text)) for text in texts])
        loss = policy(input_ids=rows, labels=rows.masked_fill(rows == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


@torch.no_grad()
def _answers(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], count: int
) -> Iterator[list[str]]:
    """Samples that ended, without those that are there twice. (All prompts have the same number of tokens.)"""
    for at in range(0, len(prompts), 64):
        batch = [[{"role": "user", "content": prompt}] for prompt in prompts[at : at + 64]]
        inputs = tokenizer.apply_chat_template(batch, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        drawn = policy.generate(**inputs, do_sample=True, num_return_sequences=2 * count, max_new_tokens=LONGEST + 4)
        texts = tokenizer.batch_decode(drawn[:, inputs["input_ids"].shape[1] :])
        for first in range(0, len(texts), 2 * count):
            ended = (text.partition(" </s>")[0] for text in texts[first : first + 2 * count] if "</s>" in text)
            yield list(dict.fromkeys(ended))[:count]
