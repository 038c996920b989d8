"""Files of rows, scripts that are run in this process, and what the documentation says."""

import json
import re
import runpy
import sys

from tests.conftest import ROOT
from tests.tiny import save_tiny_model


def save_stopping_model(folder):
    """Writes a tiny model that ends about two responses in three itself within 6 tokens: any of 40 tokens stops it."""
    name = save_tiny_model(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(2, 320, 8))}))
    return name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8").read().split("\n")[:-1]]


def script(monkeypatch, name, *arguments):
    """Runs a script of alignment-handbook/scripts in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "alignment-handbook" / "scripts" / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


class Killed(Exception):
    """Stands for a kill."""


def documentation():
    """Every page, script and recipe that names commands, with commands of several lines joined."""
    paths = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("run_*.py")]
    paths += [*ROOT.glob("yamls/*.yaml"), *ROOT.glob("alignment-handbook/scripts/*.py")]
    paths += [*ROOT.glob("alignment-handbook/recipes/*.sh"), *ROOT.glob("alignment-handbook/recipes/*/*.yaml")]
    return re.sub(r"\\\n[# ]*", " ", "\n".join(path.read_text() for path in paths))
