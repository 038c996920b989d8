"""What a run prints on a terminal and elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PrinterCallback, ProgressCallback

from alignment.report import console
from alignment.report.console import ConsoleCallback, next_steps, print_lines
from tests.conftest import ROOT
from tests.trainers import make_trainer, reward_rows


@pytest.mark.parametrize("no_bars", [True, False])
def test_lines_stand_in_for_upstreams_dicts(tmp_path, capsys, no_bars):
    trainer = make_trainer(tmp_path, reward_rows(8), eval_rows=reward_rows(4), max_steps=2, disable_tqdm=no_bars)
    print_lines(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ConsoleCallback in kinds and not {PrinterCallback, ProgressCallback} & {*kinds}
    trainer.train()
    trainer.evaluate()
    printed = capsys.readouterr()
    lines = [line.split("  ") for line in printed.out.splitlines() if line.startswith(("step", "eval"))]
    assert [line[0] for line in lines] == ["step 1/2", "step 2/2", "eval 2/2"]
    assert lines[0][4] == "acc 0.50" and lines[0][-1].endswith(" left"), "nothing is learned before the first step"
    assert "lr" not in " ".join(lines[2]) and "{" not in printed.out
    assert "it/s" not in printed.err, "no terminal, no bars"
    assert {"rewards/rank_0", "grad_norm", "train_runtime"} <= {*trainer.state.log_history[0]}, "where all is kept"


def test_the_table_of_a_notebook_stays(tmp_path):
    """It is there in place of upstream's other two."""
    trainer = make_trainer(tmp_path, reward_rows(4))
    trainer.pop_callback(PrinterCallback)
    before = [*trainer.callback_handler.callbacks]
    print_lines(trainer)
    assert trainer.callback_handler.callbacks == before


def test_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [name for name, _ in next_steps("runs/x")] == ["talk to it"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.chdir(tmp_path)
    for name in ("report.html", "adapter_config.json"):
        (tmp_path / name).touch()
    scripts = os.path.relpath(ROOT / "alignment-handbook" / "scripts")
    assert next_steps(f"{tmp_path}/") == [
        ("look at it", f"python -m webbrowser file://{tmp_path}/report.html"),
        ("talk to it", f"python {scripts}/chat.py {tmp_path}/"),
        ("merge it", f"python {scripts}/merge.py {tmp_path} --output {tmp_path}-merged"),
    ]
    assert next_steps(".")[0] == ("look at it", "python -m webbrowser file://$PWD/report.html")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert next_steps(str(tmp_path))[1][1].startswith(os.path.relpath(sys.executable)), "it is not activated"
    monkeypatch.setattr(console, "SCRIPTS", tmp_path)
    assert next_steps(str(tmp_path))[1][1] == f"nca chat {tmp_path}", "it is installed, without the scripts"


#: Bars of tqdm, transformers and datasets, imported before or after the script begins.
BARS = """
from alignment import errors
def draw():
    import datasets, tqdm.auto, transformers
    list(tqdm.auto.tqdm(range(3), desc="ours"))
    list(transformers.utils.logging.tqdm(range(3), desc="Loading weights"))
    datasets.Dataset.from_list([{"a": 1}]).map(lambda row: row, desc="map", load_from_cache_file=False)
if __name__ == "__main__":
    %s
    errors.run(draw)
"""


@pytest.mark.parametrize("first", ["", "import datasets, tqdm.auto, transformers"])
def test_no_bars_without_a_terminal(tmp_path, first):
    (tmp_path / "script.py").write_text(BARS % first)
    env = {name: value for name, value in os.environ.items() if not name.endswith(("PROGRESS_BARS", "TQDM_DISABLE"))}
    run = subprocess.run([sys.executable, tmp_path / "script.py"], env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
