"""Make the prompts of the embedded reward data: requests with conditions that a function can check.

    python data/make_prompts.py runs/data

Writes prompts_TASK_train.jsonl and prompts_TASK_eval.jsonl for each of the tasks, checkable and words, one row a line.
`make data` goes on from there: sample.py, score.py, convert.py. The same seed gives the same prompts.
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
#: So many topics have prompts for words, because their many responses take long to sample.
WORDS_TOPICS = 48
OPENERS = "Well Today Yes Sometimes Many Imagine".split()


def checkable_prompt(topic: str, rng: random.Random) -> Messages:
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
    return _turn(" ".join([f"Tell me briefly about {topic}.", *conditions]))


def words_prompts(topics: list[str]) -> list[Messages]:
    """Returns two requests about each topic, one for short words and one for long words."""
    wishes = ("short", "long")
    return [_turn(f"Tell me about {topic} in one sentence. Use {wish} words.") for topic in topics for wish in wishes]


def checkable_prompts(topics: list[str], count: int, rng: random.Random) -> list[Messages]:
    """Returns `count` different prompts that go round the topics."""
    prompts: dict[str, Messages] = {}
    while len(prompts) < count:
        prompt = checkable_prompt(topics[len(prompts) % len(topics)], rng)
        prompts[prompt[0]["content"]] = prompt
    return list(prompts.values())


def _turn(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--num_train", type=int, default=220, help="prompts of checkable to train on")
    parser.add_argument("--num_eval", type=int, default=66, help="held-out prompts of checkable")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, topics, count in [("train", TRAIN_TOPICS, args.num_train), ("eval", EVAL_TOPICS, args.num_eval)]:
        checkable = checkable_prompts(topics, count, random.Random(f"{name} {args.seed}"))
        for task, prompts in [("checkable", checkable), ("words", words_prompts(topics[:WORDS_TOPICS]))]:
            lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
            (args.folder / f"prompts_{task}_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{args.folder}/prompts_{task}_{name}.jsonl: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
