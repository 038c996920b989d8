"""How a script ends, and that what it writes is there whole or not at all."""

import os
import re
import signal
import subprocess
import sys

import pytest

from alignment import errors
from alignment.errors import UserError
from alignment.files import atomic_path, read_json, write_json
from tests.conftest import ROOT


def raise_(error):
    raise error


def exit_code(error, capsys):
    """Exit code of a script in which an error is raised, and the last line that it prints."""
    with pytest.raises(SystemExit) as stopped:
        errors.run(lambda: raise_(error))
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_users_error_is_one_line(capsys):
    code, line = exit_code(UserError("rows.jsonl, line 3:\n  no scores"), capsys)
    assert (code, line) == (2, "error: rows.jsonl, line 3: no scores")
    code, line = exit_code(OSError(28, "No space left on device", "out/rows"), capsys)
    assert (code, line) == (2, "error: out/rows cannot be written: No space left on device; make room")


def test_a_misspelt_flag_is_named_before_one_that_is_missing():
    parser = errors.ArgumentParser("About.")
    parser.add_argument("--output", required=True)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--engine", choices=["auto", "vllm"])
    for words, message in (
        (["--ouput", "x"], r"^unknown flag --ouput; did you mean --output\?$"),
        (["--output=x", "--both"], "^unknown flag --both; see --help$"),
        (["--top_p=1"], "the following arguments are required: --output; see --help"),
        (["--output=x", "--top_p", "many"], "--top_p: invalid float value: 'many'; see --help"),
        (["--output=x", "--engine=vlm"], r"^command line: --engine: invalid choice: 'vlm' .*; did you mean 'vllm'\?$"),
    ):
        with pytest.raises(UserError, match=message):
            parser.parse_args(words)
    assert parser.parse_args(["--output", "x", "--top_p", "-1"]).top_p == -1


@pytest.mark.parametrize("script", ["sample", "generate_answers", "judge", "score"])
def test_a_script_is_quick_to_answer(script):
    command = [sys.executable, "-X", "importtime", f"{ROOT}/alignment-handbook/scripts/{script}.py", "--ouput"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "error: unknown flag --ouput; did you mean --output" in run.stderr
    assert not re.search(r"\|\s+(torch|transformers|trl|peft)$", run.stderr, re.M)


def test_a_lost_process_is_told_from_other_errors(capsys, monkeypatch):
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError):  # one process has no peers
        errors.run(lambda: raise_(lost))
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, line = exit_code(lost, capsys)
    assert code == 1
    assert line.startswith("error: another process of this run has died")
    with pytest.raises(RuntimeError, match="of another kind"):
        errors.run(lambda: raise_(RuntimeError("of another kind")))


def test_sigterm_outside_of_training_is_no_success(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            errors.run(lambda: os.kill(os.getpid(), signal.SIGTERM), exit_on_sigterm=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "the results are not written" in capsys.readouterr().out


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "plan.json"
    write_json(file, {"steps": 3})
    with pytest.raises(TypeError):
        write_json(file, {"steps": object()})
    with pytest.raises(ZeroDivisionError), atomic_path(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert read_json(file) == {"steps": 3}
    assert os.listdir(tmp_path) == ["plan.json"]
    assert read_json(tmp_path / "none.json") is None


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / ".rows.partial").mkdir()  # a kill left it
    (tmp_path / ".rows.partial" / "old").touch()
    with atomic_path(tmp_path / "rows") as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert not (tmp_path / "rows").exists()
    assert os.listdir(tmp_path / "rows") == ["new"]
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "more") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["rows"]
