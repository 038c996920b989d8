"""The notebook: its four cells run in order, show the report and answer; no outputs are committed."""

import ast
import html
import json
import sys
from types import SimpleNamespace

from tests.conftest import ROOT
from tests.scripts import write


def cells():
    return json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]


def run_cell(source, namespace):
    """Executes a cell; what its last line gives, as a notebook shows it."""
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    exec(compile(ast.Module([last], []), "cell", "exec"), namespace)


def test_the_notebook_trains_shows_and_talks(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")  # where it is opened
    monkeypatch.syspath_prepend(str(tmp_path))  # and sys.path is put back
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=lambda text: text))
    rows = [{"prompt": f"Name {i}", "responses": ["Paris is", "Rome"], "scores": [1.0, 0.5]} for i in range(6)]
    data = {
        "train_file": write(tmp_path / "train.jsonl", rows[:4]),
        "eval_file": write(tmp_path / "eval.jsonl", rows[4:]),
    }
    (tmp_path / "length.py").write_text("def length(prompts, completions): return [len(str(c)) for c in completions]")
    keys = data | {"model_name_or_path": tiny_model, "max_steps": 1, "reward_function": f"{tmp_path}/length.py:length"}
    ours = {"output_dir": str(tmp_path / "out"), "flags": [f"--{key}={value}" for key, value in keys.items()]}
    namespace, shown = {}, []
    for i, cell in enumerate(cells()):
        shown.append(run_cell("".join(cell["source"]), namespace))
        if i == 0:
            assert (namespace["root"] / namespace["recipe"]).exists()
            namespace |= ours
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Finished" in report
    assert html.escape(report) in shown[2]
    printed = capsys.readouterr().out
    assert "held-out score (95 %)" in printed
    assert printed.count("\n- ") >= 3, "three answers"


def test_no_outputs_are_committed():
    assert len(cells()) == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())
