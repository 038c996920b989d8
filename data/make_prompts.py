"""Make the prompts of the embedded reward data: requests with conditions that a function can check.

    python data/make_prompts.py runs/data

Writes prompts_train.jsonl and prompts_eval.jsonl, one row a line. `make data` goes on from there: sample.py, score.py,
convert.py. The same seed gives the same prompts.
"""

import argparse
import json
import random
from pathlib import Path

Messages = list[dict[str, str]]

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


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--num_train", type=int, default=220, help="prompts to train on")
    parser.add_argument("--num_eval", type=int, default=66, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, topics, count in [("train", TRAIN_TOPICS, args.num_train), ("eval", EVAL_TOPICS, args.num_eval)]:
        prompts = make_prompts(topics, count, random.Random(f"{name} {args.seed}"))
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
        (args.folder / f"prompts_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{args.folder}/prompts_{name}.jsonl: {count} prompts")


if __name__ == "__main__":
    main()
