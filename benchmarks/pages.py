"""Pages of docs/ that are made of numbers: paragraphs, tables, figures."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from alignment.files import write_text


def save_figure(figure: Figure, docs: Path, name: str) -> None:
    """Writes a figure into the pages' folder of figures."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "figures" / name, dpi=130)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: Path, parts: Sequence[str]) -> Path:
    """Writes the parts, which are paragraphs or several with empty lines between, one below the other."""
    blocks = [_wrapped(block) for part in parts for block in part.split("\n\n")]
    write_text(page, "\n\n".join(blocks) + "\n")
    return page


def _wrapped(block: str) -> str:
    """A paragraph in lines of at most 100 characters; code, tables, headings, images and lists as they are."""
    if block[0] in "`|#!" or re.match(r"\d+\. ", block):
        return block
    return textwrap.fill(block, 100, break_long_words=False, break_on_hyphens=False)
