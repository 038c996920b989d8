"""The command line by itself: the help, and misspelt keys, without the slow imports."""

import re
import runpy
import subprocess
import sys

import pytest

from alignment.configs import Configs
from alignment.errors import UserError
from alignment.recipe import flags
from alignment.recipe.flags import check_command_line, check_known, described_keys, known_flags
from alignment.recipe.help import help_text
from alignment.recipe.parse import StrictParser
from tests.conftest import ROOT
from trl_nca.config import UNSUPPORTED


def test_the_described_keys_are_those_of_the_parser():
    """Where it fails, run `make docs`."""
    generator = runpy.run_path(str(ROOT / "docs" / "generate_options.py"))
    assert generator["described_keys"]() == generator["KEYS"].read_text(encoding="utf-8")
    parser = StrictParser(list(Configs.__annotations__.values()))
    assert {*described_keys()} == {*parser.keys} - {"help"}
    for option in parser._option_string_actions:
        check_known(option.lstrip("-").replace("-", "_"), [*known_flags(), "help", "h"])


@pytest.mark.parametrize("script", ["run_reward.py", "run_preference.py"])
@pytest.mark.parametrize(
    ("recipe", "flags", "code", "words"),
    [
        ("{}", ["--help"], 0, "\nLoss and memory:\n"),
        ("{}", ["--betta=0.5"], 2, "error: unknown flag --betta; did you mean --beta?\n"),
        ("betta: 0.5", [], 2, ".yaml: unknown key 'betta'; did you mean 'beta'?\n"),
        ("{}", ["beta=0.5"], 2, "write --key=value\n"),
    ],
)  # fmt: skip
def test_help_and_typos_are_answered_before_the_slow_imports(tmp_path, script, recipe, flags, code, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    command = [sys.executable, "-X", "importtime", ROOT / script, path, *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code and words in run.stdout + run.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "yaml" in imported and not imported & {"torch", "transformers", "trl", "peft", "numpy", "datasets"}


def test_keys_of_other_versions_are_left_to_the_parser(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("{}")
    argv = [str(tmp_path / "recipe.yaml"), "--new_key=1"]
    with pytest.raises(UserError, match="unknown flag --new_key"):
        check_command_line(argv, "About.")
    monkeypatch.setattr(flags, "version", lambda package: "5.99.0")
    assert check_command_line(argv, "About.") is None


def test_the_help_has_the_keys_that_can_be_set():
    short, full = (help_text("run_reward.py", "About.", described_keys(), everything) for everything in (False, True))
    named = [re.findall(r"^  --(\S+)", text, re.M) for text in (short, full)]
    assert {"loss_type", "learning_rate", "train_file", "lora_r", "plan"} <= {*named[0]} < {*named[1]}
    assert {*named[1]} == {*described_keys()} - {*UNSUPPORTED}, "and none that is refused"
    assert len(named[1]) == len({*named[1]})
    assert max(map(len, short.splitlines())) <= 100
