"""What responses that share their beginnings save: tokens of a forward in two levels, in a tree, and in the layout.

    python -m benchmarks.prefixes data/*.jsonl       rows of a form that docs/data.md names, the embedded model's tokens
    python -m benchmarks.prefixes --shapes           groups drawn from trees of turns, not from data

In two levels a group runs its prompt once and each response whole, from the prompt's last token to its own last but
one. A tree runs each beginning that two of these share once: as many tokens as a trie over them has nodes. The layout
lets a response go on from one before it, where they share 8 tokens or more (`trl_nca.collate.find_branches`).
"""

import argparse
import itertools
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from trl_nca.collate import find_branches

MODEL = "models/SmolLM2-135M-Instruct"


class Tokens(NamedTuple):
    """Tokens of forwards in two levels, and those of them that a tree would leave out, and that the layout does."""

    responses: int
    two_levels: int
    of_tree: int
    of_layout: int


def trie_nodes(sequences: Iterable[Sequence[Hashable]]) -> int:
    """Nodes of the trie over the sequences: their different beginnings, none of them empty.

    >>> trie_nodes([[1, 2, 3], [1, 2, 4], [5]])
    5
    """
    nodes = 0
    ordered = sorted(map(tuple, sequences))  # of all others, a neighbour shares the longest beginning
    for previous, sequence in zip([(), *ordered], ordered, strict=False):
        pairs = zip(previous, sequence, strict=False)
        nodes += len(sequence) - sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return nodes


def count_group(prompt: int, response_ids: Sequence[Sequence[Hashable]]) -> Tokens:
    """Counts the tokens of a group, of which `prompt` are the prompt's."""
    inputs = [("last", *ids[:-1]) for ids in response_ids]
    all_of_them = sum(map(len, inputs))
    saved = sum(branch[1] for branch in find_branches([*map(list, response_ids)]) if branch)
    return Tokens(len(inputs), prompt - 1 + all_of_them, all_of_them - trie_nodes(inputs), saved)


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
    print("| rows | groups | responses a group | tokens in two levels | a tree saves | the layout saves |")
    print("|---|---|---|---|---|---|")
    counted = {path.name: file_groups(path, options.model, template) for path in options.files}
    counted |= {name: [draw_group(paths, 400, 200)] for name, paths in SHAPES.items() if options.shapes}
    for name, groups in counted.items():
        tokens = total(groups)
        print(
            f"| {name} | {len(groups):,} | {tokens.responses / len(groups):.1f} | {tokens.two_levels:,} "
            f"| {tokens.of_tree / tokens.two_levels:.1%} | {tokens.of_layout / tokens.two_levels:.1%} |"
        )


if __name__ == "__main__":
    main()
