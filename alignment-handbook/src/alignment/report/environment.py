"""What a run ran on, and the command that repeats it: recorded when it starts."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = "torch transformers trl peft accelerate datasets".split()
_SCRIPTS = ("run_reward.py", "run_preference.py", "nca")
#: A flag of a credential, and a value with one in it: `--hub_token=x`, `--model_init_kwargs={"token": "x"}`.
_SECRET = re.compile(r"""^--\w*(token|password|secret|api_key)\b|["'](\w*_)?(token|password|secret|api_key)["']\s*:""")


def describe_environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Date, versions, commit, device and command of this run; what cannot be found out is left out.

    Args:
        device: The one that is trained on.
        num_processes: Processes of the run.
    """
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _describe_device(device, num_processes),
        "commit": _commit(),
        "command": repeat_command(sys.argv, num_processes),
        "versions": {"python": sys.version.split()[0], **_versions()},
    }
    return {name: value for name, value in found.items() if value}


def repeat_command(argv: Sequence[str], num_processes: int = 1) -> str | None:
    """The command line, without credentials; None where it is not that of one of this project's commands.

    Example:
        >>> secrets = ["--hub_token", "x", '--model_init_kwargs={"token": "x"}']
        >>> repeat_command(["/home/me/run_reward.py", "my recipe.yaml", *secrets, "--beta=0.1"], 8)
        "accelerate launch --num_processes=8 run_reward.py 'my recipe.yaml' --beta=0.1"
        >>> repeat_command(["ipykernel_launcher.py", "-f", "kernel.json"])
    """
    name = Path(argv[0]).name
    if name not in _SCRIPTS:
        return None
    launcher = f"accelerate launch --num_processes={num_processes} " if num_processes > 1 else "python "
    words, follows = [], False
    for word in argv[1:]:
        is_secret = _SECRET.search(word) is not None
        if not is_secret and not (follows and not word.startswith("--")):
            words.append(word)
        follows = is_secret and "=" not in word
    return ("" if name == "nca" else launcher) + shlex.join([name, *words])


def _describe_device(device: torch.device, num_processes: int) -> str:
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    return f"{num_processes} x {device.type.upper()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this project's git tree; None where these files belong to none."""
    folder, file = Path(__file__).parent, Path(__file__).name
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", file], cwd=folder, check=True, capture_output=True)
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
