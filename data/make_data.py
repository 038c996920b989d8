"""Make the embedded reward data: prompts with checkable conditions, sampled responses, their scores.

    python data/make_data.py

Samples from models/SmolLM2-135M-Instruct (alignment-handbook/scripts/unpack_smollm2.py) and writes
data/checkable_train.jsonl and data/checkable_eval.jsonl, one row a line: prompt, responses, scores. data/README.md has
the time it took and what came out. The same machine and seed give the same files.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from checkable import checkable_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.sample import Messages, sample_responses

DATA = Path(__file__).parent
MODEL = DATA.parent / "models" / "SmolLM2-135M-Instruct"

TRAIN_TOPICS = (
    "tea, rain, bread, cats, the moon, trains, winter, music, gardens, rivers, football, honey, libraries, bicycles, "
    "the desert, coffee, elephants, sleep, cheese, paper, bees, mountains, chess, soup, clocks, islands, dancing, "
    "horses, salt, maps, wind, school, glass, apples, robots, the sea, birthdays, wolves, chocolate, bridges, dreams, "
    "kites, rice, owls, castles, friendship, snow, guitars, tomatoes, lighthouses, dolphins, markets, shoes, stars, "
    "forests, letters, cooking, volcanoes, puppies, umbrellas"
).split(", ")
EVAL_TOPICS = (
    "dogs, the sun, cake, airplanes, summer, painting, lakes, tennis, butter, museums, spiders, the jungle, juice, "
    "tigers, silence, potatoes, wood, beaches, puzzles, mirrors, singing, goats, pepper, fog"
).split(", ")
WORDS = "blue friend morning happy small old light home water quiet world day warm green time people".split()
OPENERS = "Well Today Yes Sometimes Many Imagine".split()


def make_prompt(topic: str, rng: random.Random) -> Messages:
    """Returns a request about the topic with three or four conditions: on form, on signs and on words."""
    forms = ["Write exactly 1 sentence.", "Use between 8 and 16 words.", "Use at most 12 words."]
    signs = ["Do not use commas.", "Include a number written in digits."]
    words = [
        f'Mention the word "{rng.choice(WORDS)}".',
        f'Begin with the word "{rng.choice(OPENERS)}".',
        'Do not use the word "the".',
    ]
    conditions = [rng.choice(forms), *rng.sample(signs, rng.choice([1, 1, 2])), rng.choice(words)]
    rng.shuffle(conditions)
    return [{"role": "user", "content": " ".join([f"Tell me briefly about {topic}.", *conditions])}]


def make_prompts(topics: list[str], count: int, rng: random.Random) -> list[Messages]:
    """Returns `count` different prompts that go round the topics."""
    prompts: dict[str, Messages] = {}
    while len(prompts) < count:
        prompt = make_prompt(topics[len(prompts) % len(topics)], rng)
        prompts[prompt[0]["content"]] = prompt
    return list(prompts.values())


def make_row(prompt: Messages, responses: list[str], is_whole: Callable[[str], bool]) -> dict | None:
    """Returns the row without duplicates and cut responses; None where nothing can be learned from it.

    That is: fewer than four responses, or all of the same score. A cut response would teach to stop in mid-sentence.
    """
    responses = list(dict.fromkeys(response.strip() for response in responses if is_whole(response)))
    scores = checkable_score([prompt] * len(responses), responses)
    if len(responses) < 4 or len(set(scores)) == 1:
        return None
    return {"prompt": prompt, "responses": responses, "scores": [round(score, 4) for score in scores]}


def main() -> None:
    """Samples both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_train", type=int, default=220, help="prompts to sample for training")
    parser.add_argument("--num_eval", type=int, default=66, help="held-out prompts to sample")
    parser.add_argument("--num_samples", type=int, default=6, help="responses a prompt, before duplicates go")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest response, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)

    def is_whole(response: str) -> bool:
        """Whether the model ended the response itself; encoding anew can merge a few of its tokens."""
        return len(tokenizer(response).input_ids) < args.max_new_tokens - 4

    splits = {"train": (TRAIN_TOPICS, args.num_train), "eval": (EVAL_TOPICS, args.num_eval)}
    for name, (topics, count) in splits.items():
        prompts = make_prompts(topics, count, random.Random(f"{name} {args.seed}"))
        responses = sample_responses(
            model,
            tokenizer,
            prompts,
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=96,
            seed=args.seed,
            desc=name,
        )
        rows = [make_row(*pair, is_whole) for pair in zip(prompts, responses, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row]
        path = DATA / f"checkable_{name}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path.name}: {len(lines)} of {count} prompts kept, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
