"""Files around the code: what they say of it, and that a run's products are kept out of the repository."""

import subprocess
import sys
import tomllib

import pytest
import yaml

from alignment import errors
from alignment.configs import parse_configs
from alignment.errors import UserError
from tests.conftest import ROOT
from trl_nca.paper import ARXIV, CITATION, TITLE


def version():
    versions = {tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]["version"]
                for part in ("trl", "alignment-handbook")}  # fmt: skip
    (found,) = versions
    return found


def test_the_citation_is_of_the_paper_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "those that the format needs"
    assert (citation["type"], citation["license"], citation["version"]) == ("software", "MIT", version())
    paper = citation["preferred-citation"]
    assert (paper["title"], paper["year"]) == (TITLE, 2024)
    assert ARXIV in paper["url"]
    assert " and ".join(f"{a['given-names']} {a['family-names']}" for a in paper["authors"]) in CITATION


def test_the_changes_begin_with_what_is_unreleased():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## Unreleased", f"## {version()}"]


def test_the_form_for_errors_is_one():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields.values())
    assert {key for key, field in fields.items() if field.get("validations", {}).get("required")} == {
        "what", "command", "versions",
    }  # fmt: skip


def git(*arguments):
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def test_what_runs_write_is_not_committed():
    outputs = [yaml.safe_load(path.read_text())["output_dir"] for path in (ROOT / "yamls").glob("*.yaml")]
    assert all(output.startswith("runs/") for output in outputs)
    assert len(set(outputs)) == len(outputs), "no recipe takes the folder of another"
    written = [f"{output}/plan.json" for output in [*outputs, "data/test_run"]]
    assert git("check-ignore", *written) == written
    assert not git("ls-files", "runs", "data/*/*", "*/plan.json", "*.safetensors")


@pytest.mark.parametrize("given", ["--output_dir=", "--output_dir= "])
def test_a_run_without_a_folder_is_refused(given, monkeypatch, capsys):
    with pytest.raises(UserError, match="^output_dir: is empty or not given; name a folder, as --output_dir=runs/mine"):
        parse_configs([str(ROOT / "yamls/reward_cpu.yaml"), given])
    monkeypatch.setattr(sys, "argv", ["run_reward.py"])
    with pytest.raises(SystemExit) as stopped:
        errors.run(lambda: parse_configs([str(ROOT / "yamls/reward_cpu.yaml"), given]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: output_dir: ")
