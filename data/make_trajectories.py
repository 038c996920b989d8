"""Make the embedded trajectories: a model that calls a calculator, turn by turn, on word problems; with their scores.

    python data/make_trajectories.py train runs/data/calculator_train.jsonl

The same seed gives the same problems, and on the same machine the same rows. A prompt shows two problems that were
solved with the calculator, and asks for a third.
"""

import argparse
import json
import random
from pathlib import Path

from calculator import TOOL, Message, calculate, calculator_score, read_turn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.sampling.sample import SamplingConfig, encode_prompt, sample_batch

TEMPLATE = Path(__file__).with_name("calculator.jinja")
NAMES = "Ben Mia Tom Eva Ann Max Ida Leo Kim Jan Zoe Tim Amy Dan Joy Roy".split()
ITEMS = {
    "train": "apples pens stickers nuts coins beads books shells stamps balls cards stones eggs cups roses".split(),
    "eval": "pears hats tickets grapes keys buttons maps leaves bricks cakes".split(),
}
SHOTS = [
    ("Sam has 5 hats and buys 3 more. How many hats does Sam have now?", "5 + 3"),
    ("Lea buys 3 packs of 10 cards and loses 4. How many cards are left?", "3 * 10 - 4"),
]
#: Text of a problem, and what computes its answer: {a} to {c} are its numbers.
PROBLEMS = [
    ("{name} has {a} {items} and buys {b} more. How many {items} does {name} have now?", "a + b"),
    ("{name} has {a} {items} and gives {b} of them away. How many {items} are left?", "a - b"),
    ("There are {a} boxes with {b} {items} each. How many {items} are there?", "a * b"),
    ("{name} shares {a} {items} equally among {b} friends. How many {items} does each friend get?", "a / b"),
    ("{name} buys {a} bags of {b} {items} and loses {c}. How many {items} are left?", "a * b - c"),
    ("{name} has {a} {items} and gets {b} boxes of {c} {items}. How many {items} does {name} have now?", "a + b * c"),
]
COUNTS = {"train": 100, "eval": 40}  # problems that are sampled
NUM_RESPONSES = 4
DRAWN = 6  # first turns of a problem, of which the first four that differ go on


def draw_problem(name: str, items: list[str], rng: random.Random) -> tuple[str, float]:
    """Draws a word problem of one or two operations, whose answer is a whole number above 0; returns it with that."""
    text, expression = rng.choice(PROBLEMS)
    while True:
        numbers = {letter: rng.randint(2, 20) for letter in "abc"}
        numbers["a"] *= rng.choice([1, numbers["b"]]) if "/" in expression else 1
        written = expression
        for letter, number in numbers.items():
            written = written.replace(letter, str(number))
        answer = calculate(written)
        if 0 < answer < 1000 and answer == round(answer):
            return text.format(name=name, items=rng.choice(items), **numbers), round(answer)


def make_problems(split: str, count: int, seed: int) -> dict[str, float]:
    """Draws `count` different problems with their answers."""
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, float] = {}
    while len(problems) < count:
        text, answer = draw_problem(rng.choice(NAMES), ITEMS[split], rng)
        problems[text] = answer
    return problems


def make_prompt(problem: str) -> list[Message]:
    """A conversation whose last turn is the problem: a 135M model calls a tool once it has seen it done."""
    turns: list[Message] = [{"role": "system", "content": "Solve each problem with the calculator."}]
    for text, expression in SHOTS:
        call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
        turns += [ask(text), {"role": "assistant", "content": "", "tool_calls": [call]}, run_call(call)]
        turns.append({"role": "assistant", "content": f"The answer is {turns[-1]['content']}."})
    return [*turns, ask(problem)]


def ask(problem: str) -> Message:
    """The user's turn."""
    return {"role": "user", "content": f"{problem} Use the calculator."}


def run_call(call: Message) -> Message:
    """The tool's turn: what the calculator says to a call."""
    try:
        result = f"{calculate(call['function']['arguments']['expression']):.10g}"
    except ValueError as error:
        result = f"error: {error}"
    return {"role": "tool", "name": "calculator", "content": result}


class Agent:
    """A model that goes on with conversations.

    Args:
        model, tokenizer: The model, and its tokenizer with a template that knows tools.
        seed: Seeds the samples.
    """

    def __init__(self, model, tokenizer, seed: int):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    def turns(self, conversations: list[list[Message]], num_samples: int, max_new_tokens: int) -> list[list[str]]:
        """Samples the next turn of each conversation; returns the texts that the model ended by itself."""
        config = SamplingConfig(num_samples, max_new_tokens, temperature=0.7, batch_size=48, seed=self.seed)
        ids = [encode_prompt(self.tokenizer, messages, [TOOL]) for messages in conversations]
        texts: list[list[str]] = [[] for _ in ids]
        for index, batch in enumerate(tqdm(config.batches(ids))):
            samples = sample_batch([ids[i] for i in batch], index, self.model, self.tokenizer, config)
            for i, of_one in zip(batch, samples, strict=True):
                texts[i] = [sample.text.strip() for sample in of_one if sample.finished and sample.text.strip()]
        return texts


def sample_trajectories(agent: Agent, prompts: list[list[Message]]) -> list[list[list[Message]]]:
    """Samples first turns; those with a call get its result, and then a second turn.

    Returns:
        For each prompt up to four trajectories that differ in their first turn.
    """
    drawn = agent.turns(prompts, DRAWN, max_new_tokens=40)
    firsts = [[[read_turn(text)] for text in [*dict.fromkeys(of_one)][:NUM_RESPONSES]] for of_one in drawn]
    calls = [(i, turns) for i, of_one in enumerate(firsts) for turns in of_one if "tool_calls" in turns[0]]
    for _, turns in calls:
        turns.append(run_call(turns[0]["tool_calls"][0]))
    answers = agent.turns([prompts[i] + turns for i, turns in calls], 1, max_new_tokens=16)
    for (_, turns), texts in zip(calls, answers, strict=True):
        turns += [{"role": "assistant", "content": text} for text in texts]
    # A trajectory without its last turn ran into the limit.
    return [[turns for turns in of_one if turns[-1]["role"] == "assistant"] for of_one in firsts]


def make_rows(agent: Agent, problems: dict[str, float]) -> list[dict]:
    """Rows of four scored trajectories; without prompts that have fewer, or one score for all."""
    prompts = [make_prompt(problem) for problem in problems]
    rows = []
    for prompt, number, responses in zip(prompts, problems.values(), sample_trajectories(agent, prompts), strict=True):
        scores = calculator_score([prompt] * len(responses), responses, [number] * len(responses))
        if len(responses) == NUM_RESPONSES and len(set(scores)) > 1:
            rows.append({"prompt": prompt, "tools": [TOOL], "responses": responses, "scores": scores, "number": number})
    return rows


def main() -> None:
    """Samples the rows of one split and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("split", choices=[*COUNTS])
    parser.add_argument("output", type=Path, help="a .jsonl")
    parser.add_argument("--model_name_or_path", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--num_problems", type=int, help=f"default: {COUNTS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    agent = Agent(AutoModelForCausalLM.from_pretrained(args.model_name_or_path), tokenizer, args.seed)
    problems = make_problems(args.split, args.num_problems or COUNTS[args.split], args.seed)
    rows = make_rows(agent, problems)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output}: {len(rows)} of {len(problems)} problems")


if __name__ == "__main__":
    main()
