"""What is installed: the wheel, the command `nca`, and what the packages say that they need."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nca
from alignment.errors import UserError
from alignment.files import shipped
from alignment.models import PolicyConfig
from tests.conftest import ROOT
from tests.scripts import documentation

#: Folders of the repository by where a wheel has them.
FOLDERS = {
    "trl_nca": "trl/src/trl_nca",
    "alignment": "alignment-handbook/src/alignment",
    "alignment/recipes": "alignment-handbook/recipes",
    "alignment/scripts": "alignment-handbook/scripts",
    "alignment/yamls": "yamls",
}
PROJECTS = ["pyproject.toml", "trl/pyproject.toml", "alignment-handbook/pyproject.toml"]


def git_files(*folders):
    listed = ["git", "ls-files", "-co", "--exclude-standard", "--deduplicate", *folders]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built without the network from a copy of what git has: builds leave files beside the sources."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in git_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}"]
    subprocess.run([*pip, str(source)], check=True, timeout=120)
    (file,) = out.glob("*.whl")
    return file


def test_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packaged = [name for name in names if ".dist-info/" not in name]
    expected = {name for name in os.listdir(ROOT) if name.endswith(".py")}
    for place, folder in FOLDERS.items():
        expected |= {f"{place}/{name.removeprefix(f'{folder}/')}" for name in git_files(folder)}
    assert set(packaged) == expected
    assert {"alignment/py.typed", "trl_nca/py.typed", "alignment/yamls/reward_cpu.yaml"} <= expected


def test_unpacked_wheel_runs_from_an_empty_folder(wheel, tmp_path):
    """The command finds scripts and recipes; no module of the clone is imported, and neither torch nor transformers."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    code = (
        "import sys, nca, trl_nca\n"
        "try: nca.main()\n"
        "except SystemExit as stop: print('exit', stop.code)\n"
        "print(nca.find_recipe('reward_cpu.yaml'), nca.SCRIPTS, nca.__file__, trl_nca.__file__, end=' ')\n"
        "print(nca.shipped('run_reward.py'))\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code, "train"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    run = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "error: nca train: no recipe given; name one of these, or a file of your own\n"
    assert "  reward_cpu.yaml        NCA on K-response rewards on a CPU\n" in run.stdout
    assert "exit 2" in run.stdout
    paths = run.stdout.split("\n")[-2].split()
    assert len(paths) == 5
    assert all(path.startswith(str(site)) and Path(path).exists() for path in paths)


def test_trainers_are_imported_from_the_package_when_they_are_asked_for(monkeypatch):
    import nca_trainer
    import trl_nca
    from trl_nca import NCAConfig, NCATrainer, PairwiseNCATrainer

    assert [NCATrainer, PairwiseNCATrainer] == [nca_trainer.NCATrainer, nca_trainer.PairwiseNCATrainer]
    assert NCAConfig is nca_trainer.NCAConfig
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        from trl_nca import Trainer  # noqa: F401
    monkeypatch.setitem(sys.modules, "nca_trainer", None)  # as if it were not installed
    with pytest.raises(
        ImportError, match="NCATrainer is in nca_trainer.py, which `pip install .` at the repository's root"
    ):
        trl_nca.NCATrainer  # noqa: B018
    assert trl_nca.NCAConfig is NCAConfig


def test_shipped_files_are_found_in_a_clone():
    assert shipped("yamls") == ROOT / "yamls"
    assert shipped("recipes/model_configs") == ROOT / "alignment-handbook/recipes/model_configs"
    assert shipped("scripts") == ROOT / "alignment-handbook/scripts"


def test_all_packages_are_named():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(listed["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    found = {place.replace("/", ".") for place in FOLDERS}
    for package in ("alignment", "trl_nca"):
        found |= {f"{package}.{path.parent.name}" for path in (ROOT / FOLDERS[package]).glob("*/__init__.py")}
    assert set(listed["packages"]) == found


@pytest.mark.parametrize("flag", [[], ["--help"]])
def test_nca_lists_its_commands(capsys, flag):
    nca.run(flag)
    printed = capsys.readouterr().out
    for command in "train preference plan convert sample score iterate sweep report merge chat".split():
        assert re.search(rf"^  {command} +\w.*$", printed, re.MULTILINE)


def test_documented_commands_are_there():
    named = re.findall(r"(?:`|^|-m )nca ([a-z]+)", documentation(), re.MULTILINE)
    assert len(named) > 10
    assert set(named) == set(nca.COMMANDS)


def test_mistyped_command():
    with pytest.raises(UserError, match="nca has no command 'trian'; did you mean 'train'"):
        nca.run(["trian"])


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nca.find_recipe("reward_cpu.yaml") == nca.find_recipe("reward_cpu") == str(ROOT / "yamls/reward_cpu.yaml")
    assert nca.find_recipe("mine/reward_cpu.yaml") == "mine/reward_cpu.yaml", "a path is not looked for elsewhere"
    assert nca.find_recipe("--help") == "--help"
    (tmp_path / "reward_cpu.yaml").touch()
    assert nca.find_recipe("reward_cpu.yaml") == "reward_cpu.yaml", "one's own file comes first"


def test_command_is_the_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "responses": ["a", "bb"]}\n' * 3)
    (tmp_path / "size.py").write_text(
        "def size(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    out = tmp_path / "scored.jsonl"
    nca.run(["score", f"{tmp_path}/rows.jsonl", f"--reward_function={tmp_path}/size.py:size", f"--output={out}"])
    assert len(out.read_text().splitlines()) == 3
    with pytest.raises(SystemExit) as stopped:
        nca.run(["score", "--help"])
    assert stopped.value.code == 0
    assert "usage: nca score " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "preference", "sample", "chat", "score", "merge", "report"])
def test_help_comes_before_the_slow_imports(command):
    code = "import sys, nca\ntry: nca.main()\nfinally: assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"usage: nca {command} " in run.stdout


def test_plan_is_train_with_plan(monkeypatch):
    started = []
    monkeypatch.setattr(nca, "run_script", lambda *arguments: started.append(arguments))
    nca.run(["plan", "reward_cpu", "--num_prompts=9"])
    recipe = str(ROOT / "yamls/reward_cpu.yaml")
    assert started == [(ROOT / "run_reward.py", "nca plan", [recipe, "--num_prompts=9", "--plan=true"])]


def test_help_of_iterate():
    run = subprocess.run(["bash", str(nca.SCRIPTS / "iterate.sh"), "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("Rounds of on-policy alignment")
    assert "RECIPE ROUNDS OUTPUT_DIR" in run.stdout
    assert "set -euo" not in run.stdout


def test_iterate_takes_the_python_that_runs_nca(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(nca, "run_script", lambda *arguments: None)
    nca.run(["iterate", "reward_cpu", "2", "out"])
    ((program, argv, env),) = started
    assert [program, *argv[1:]] == [
        "bash",
        str(nca.SCRIPTS / "iterate.sh"),
        str(ROOT / "yamls/reward_cpu.yaml"),
        "2",
        "out",
    ]
    assert env["PYTHON"] == sys.executable


def test_what_is_needed_is_the_same_in_all_projects():
    projects = [tomllib.loads((ROOT / path).read_text())["project"] for path in PROJECTS]
    assert len({project["requires-python"] for project in projects}) == 1
    whole, *parts = [set(project["dependencies"]) for project in projects]
    assert whole == set.union(*parts)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantization_without_bitsandbytes(monkeypatch, bits):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"{bits}: bitsandbytes is not installed; pip install bitsandbytes"):
        PolicyConfig("some-model", use_peft=True, **{bits: True})
