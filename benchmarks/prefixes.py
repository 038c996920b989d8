"""What responses that share their beginnings would save: tokens of a forward now, and with a tree over each group.

    python -m benchmarks.prefixes data/*.jsonl       rows of a form that docs/data.md names, the embedded model's tokens
    python -m benchmarks.prefixes --shapes           groups drawn from trees of turns, not from data

Now a group runs its prompt once and each response whole. In a tree every beginning that two responses share is run once
too, so that it runs as many tokens as a trie over the responses has nodes. The last token of the prompt, which each
response begins with, is counted apart: two levels could run it once as well.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "models/SmolLM2-135M-Instruct"


class Tokens(NamedTuple):
    """Tokens of forwards: now, those that a tree would leave out, and the repeats of the prompt's last token."""

    now: int
    shared: int
    repeats: int

    def share(self) -> float:
        """Share of the tokens that a tree would leave out."""
        return self.shared / self.now


def trie_nodes(responses: Iterable[Sequence[Any]]) -> int:
    """Nodes of the trie over the responses: their different beginnings, none of them empty.

    >>> trie_nodes([[1, 2, 3], [1, 2, 4], [5]])
    5
    """
    nodes, previous = 0, ()
    for response in sorted(tuple(r) for r in responses):  # of all, a neighbour shares the longest beginning
        common = next((i for i, (a, b) in enumerate(zip(previous, response, strict=False)) if a != b), None)
        nodes += len(response) - (min(len(previous), len(response)) if common is None else common)
        previous = response
    return nodes


def count_group(prompt: int, responses: Sequence[Sequence[Any]]) -> Tokens:
    """Counts the tokens of a group, of which `prompt` are the prompt's."""
    all_of_them = sum(map(len, responses))
    return Tokens(prompt - 1 + all_of_them, all_of_them - trie_nodes(responses), len(responses) - 1)


def total(groups: Iterable[Tokens]) -> Tokens:
    """Adds up the tokens of groups."""
    return Tokens(*map(sum, zip(*groups, strict=True)))


def file_groups(path: Path, model: str, template: str | None) -> list[Tokens]:
    """Tokenizes the rows of a file as a run does, and counts each group."""
    from transformers import AutoTokenizer

    from alignment.data.load import DataConfig, load_groups
    from trl_nca.responses import tokenize_dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    config = DataConfig(train_file=str(path), max_dropped_fraction=1.0)
    rows, _ = load_groups(config, control_tokens=tokenizer.all_special_tokens)
    kept, _ = tokenize_dataset(rows["train"], tokenizer)
    return [count_group(len(row["prompt_ids"]), row["response_ids"]) for row in kept]


def search_tree(turns: int, branches: int) -> list[tuple[int, ...]]:
    """Paths from the root to the leaves where each turn has as many next ones; a path is named by its branches."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(turns):
        paths = [(*path, branch) for path in paths for branch in range(branches)]
    return paths


def correction_tree(turns: int) -> list[tuple[int, ...]]:
    """UltraInteract's shape: a turn has a right step, which ends its path, and a wrong one, which the next follows."""
    return [(0,) * wrong + (1,) for wrong in range(turns)] + [(0,) * turns]


def draw_group(paths: Iterable[tuple[int, ...]], prompt: int, turn: int) -> Tokens:
    """Counts a group of a tree's whole trajectories, whose turns are all of `turn` tokens, results of calls with them.

    A token is named by the path that it ends, so that tokens behind a branch differ.
    """
    return count_group(prompt, [[(path[: i + 1], t) for i in range(len(path)) for t in range(turn)] for path in paths])


SHAPES = {
    "search tree, 2 turns, 2 branches each": search_tree(2, 2),
    "search tree, 3 turns, 2 branches each": search_tree(3, 2),
    "correction tree, 3 turns": correction_tree(3),
    "correction tree, 5 turns": correction_tree(5),
    "independent trajectories of 3 turns": [(i, 0, 0) for i in range(4)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default=MODEL, help="folder of the tokenizer")
    parser.add_argument("--chat_template", type=Path, help="a template in place of the tokenizer's")
    parser.add_argument("--shapes", action="store_true", help="count groups of trees: prompt 400 tokens, turn 200")
    options = parser.parse_args()
    template = options.chat_template.read_text() if options.chat_template else None
    print("| rows | groups | responses a group | tokens now | a tree saves | and the prompt's last token |")
    print("|---|---|---|---|---|---|")
    counted = {path.name: file_groups(path, options.model, template) for path in options.files}
    counted |= {name: [draw_group(paths, 400, 200)] for name, paths in SHAPES.items() if options.shapes}
    for name, groups in counted.items():
        tokens = total(groups)
        num_responses = tokens.repeats / len(groups) + 1
        print(
            f"| {name} | {len(groups):,} | {num_responses:.1f} | {tokens.now:,} | {tokens.share():.1%} "
            f"| {tokens.repeats / tokens.now:.1%} |"
        )


if __name__ == "__main__":
    main()
