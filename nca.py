"""One command for the scripts: `nca train RECIPE`, `nca convert FILE`, ...; `nca` alone lists them.

    nca train reward_cpu.yaml --beta=0.5
    accelerate launch --num_processes=8 -m nca train reward_qlora.yaml

A recipe is a file, or the name of one that comes with the project; `nca train` alone lists those. Each command is a
script, with its options, its errors and its exit codes.
"""

import difflib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from alignment import errors
from alignment.errors import UserError
from alignment.files import shipped

ROOT = Path(__file__).resolve().parent
SCRIPTS = shipped("scripts")
#: By command its script and what it does.
COMMANDS = {
    "train": (ROOT / "run_reward.py", "align a model with K scored responses a prompt"),
    "preference": (ROOT / "run_preference.py", "align a model with pairs of a chosen and a rejected response"),
    "plan": (ROOT / "run_reward.py", "steps and memory of `train` before it starts"),
    "convert": (SCRIPTS / "convert.py", "convert reward data of any known form to scored rows or pairs"),
    "sample": (SCRIPTS / "sample.py", "sample K responses to each prompt of a file"),
    "score": (SCRIPTS / "score.py", "score responses by functions and reward models"),
    "iterate": (SCRIPTS / "iterate.sh", "rounds of sample, score, convert, train and merge"),
    "sweep": (SCRIPTS / "sweep.py", "train with several settings and seeds, and compare the runs"),
    "report": (SCRIPTS / "report.py", "make the report on a run again, or compare runs"),
    "merge": (SCRIPTS / "merge.py", "merge an adapter into its base model"),
    "chat": (SCRIPTS / "chat.py", "talk to a model, side by side with its base"),
}
#: Those whose first argument is a recipe.
WITH_RECIPE = ("train", "preference", "plan", "iterate", "sweep")


def main() -> None:
    """Runs the command that the command line names."""
    errors.run(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> None:
    """Runs a command.

    Args:
        argv: The command's name and its arguments; nothing or `--help` prints the commands.

    Raises:
        UserError: There is no such command, or it needs a recipe and none is given.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        return print(usage())
    command, *arguments = argv
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"command line: nca has no command {command!r}; {hint}")
    if command in WITH_RECIPE:
        if not arguments:
            print(recipes())
            raise UserError(f"nca {command}: no recipe given; name one of these, or a file of your own")
        arguments[0] = find_recipe(arguments[0])
    if command == "plan":
        arguments.append("--plan=true")
    script = COMMANDS[command][0]
    if script.suffix == ".sh":
        run_shell(script, arguments)
    run_script(script, f"nca {command}", arguments)


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:11} {does}" for name, (_, does) in COMMANDS.items()]
    note = "`nca COMMAND --help` lists its options, and `nca train` the recipes that come with it."
    return "\n".join(["usage: nca COMMAND [ARGUMENT ...]", "", *lines, "", note])


def recipes() -> str:
    """The recipes that come with the project, a line each, and how several GPUs are started."""
    files = sorted(shipped("yamls").glob("*.yaml"))
    titles = [file.read_text(encoding="utf-8").split("\n")[0] for file in files]
    lines = [f"  {file.name:22} {title[2:].split(':')[0]}" for file, title in zip(files, titles, strict=True)]
    launch = f"accelerate launch --config_file {shipped('recipes/accelerate_configs')}/multi_gpu.yaml --num_processes=8"
    return "\n".join([f"Recipes in {shipped('yamls')}:", *lines, "On several GPUs:", f"  {launch} -m nca train RECIPE"])


def find_recipe(name: str) -> str:
    """The recipe that is meant: a file, or by its bare name, with or without .yaml, one that comes with the project."""
    file = shipped("yamls") / (name if name.endswith(".yaml") else f"{name}.yaml")
    return str(file) if Path(name).name == name and not Path(name).exists() and file.exists() else name


def run_script(file: Path, name: str, arguments: Sequence[str]) -> None:
    """Runs a Python script in this process as if it had been started, under the name that its `--help` prints."""
    sys.argv = [name, *arguments]
    spec = importlib.util.spec_from_file_location("__main__", file)
    sys.modules["__main__"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def run_shell(file: Path, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by a shell script, which runs the Python that runs this."""
    os.execvpe("bash", ["bash", str(file), *arguments], os.environ | {"PYTHON": sys.executable})


if __name__ == "__main__":
    main()
