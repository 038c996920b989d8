"""The report while a run trains: written at each evaluation, sent to trackers, and kept for code of one's own."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from datasets import Dataset
from transformers.integrations.integration_utils import MLflowCallback

from alignment import output
from alignment.job import training
from alignment.report import callback
from alignment.report.callback import ReportCallback
from alignment.report.runs import read_run
from nca_trainer import NCAConfig, NCATrainer
from run_reward import align
from tests.reports import Page, history, write_run
from tests.trainers import make_trainer, reward_rows

ROWS = [{"prompt": f"Name {i}", "responses": ["Paris is", "Rome"], "scores": [1.0, 0.5]} for i in range(8)]


class Tracker(MLflowCallback):
    """Stands for a tracker that is installed, and keeps what it is sent."""

    def __init__(self):
        self.sent = []

    def on_train_begin(self, *args, **kwargs):
        self.sent.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append((state.global_step, logs))

    def on_train_end(self, *args, **kwargs):
        pass

    def on_save(self, *args, **kwargs):
        pass

    def __del__(self):
        pass

    def found(self, name):
        return [(step, logs[name]) for step, logs in self.sent[1:] if name in logs]


def test_a_report_is_written_at_each_evaluation(tmp_path, tiny_model, monkeypatch, capsys):
    steps, tracker = [], Tracker()
    draw = callback.write_report

    def write(folder, lines=None, **settings):
        steps.append(lines[-1]["step"])
        return draw(folder, lines, **settings)

    class Tracked(NCATrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[tracker], **kwargs)

    monkeypatch.setattr(callback, "write_report", write)
    for name, part in (("train", ROWS[:5]), ("eval", ROWS[5:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    recipe = {"model_name_or_path": tiny_model, "train_file": str(tmp_path / "train.jsonl"), "beta": 0.1,
              "eval_file": str(tmp_path / "eval.jsonl"), "output_dir": str(tmp_path / "out"), "max_steps": 4,
              "eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "save_strategy": "no",
              "per_device_eval_batch_size": 2, "disable_tqdm": True}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "f.py").write_text("def length(prompts, completions): return [len(str(c)) for c in completions]")
    argv = ["--use_peft=true", "--lora_target_modules=q_proj", f"--reward_function={tmp_path}/f.py:length"]
    align([str(tmp_path / "r.yaml"), *argv, "--max_new_tokens=4", "--num_eval_samples=2"], Tracked)
    assert steps == [2, 4], "at each evaluation, before trainer_state.json is there"
    run = read_run(tmp_path / "out")
    assert run.held_out["step"] == 4
    assert len(run.curve("eval_loss")[0]) == 2, "the evaluation at the end repeats that of the last step"
    assert len(run.held_out["rewards/chosen"]) == 3, "each held-out prompt once"
    assert np.mean(run.held_out["rewards/chosen"]) == pytest.approx(run.results["eval"]["eval_rewards/chosen"])
    text = Page(tmp_path / "out" / "report.html").text
    assert "Finished" in text, "and at the end"
    assert "on 3 held-out prompts" in text
    # What it ran on, and what the recipe sets.
    assert run.environment["versions"]["trl"] == "1.16.0"
    assert {"beta", "use_peft", "max_steps"} <= set(run.environment["given"])
    assert "alpha" not in run.environment["given"]
    assert "trl 1.16.0" in text
    assert "keys at their defaults" in text
    # Trackers get the score with its interval, before and after, once they can, and the alarm.
    assert tracker.sent[0] == "begin"
    samples = run.results["samples"]
    low, high = samples["score_after_interval"]
    assert tracker.found("samples/score") == [(0, samples["score_before"]), (4, samples["score_after"])]
    assert tracker.found("samples/score_low")[1] == (4, low)
    assert tracker.found("samples/score_high")[1] == (4, high)
    assert [step for step, _ in tracker.found("alarm/nats")] == [2, 4]
    # And the divergence, from each sample after training.
    assert all(len(row["logratios"]) == 2 for row in run.after)
    assert "logratios" not in run.before[0]
    assert samples["kl"] == pytest.approx(np.mean([row["logratios"] for row in run.after]))
    assert tracker.found("samples/kl") == [(4, samples["kl"])]
    assert f"KL from the reference  {samples['kl']:z.2f} [" in capsys.readouterr().out
    assert not [line for line in run.history if "alarm/nats" in line], "trackers alone"


def test_without_held_out_rows_checkpoints_are_reported(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "samples_before.json").unlink()
    (folder / "held_out.json").unlink()
    handler = SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(eval_metrics={}, args=SimpleNamespace(recipe={"beta": 0.1}), callback_handler=handler)
    seen = ReportCallback(trainer)
    state = SimpleNamespace(is_world_process_zero=True, log_history=history(), global_step=0)
    for strategy, written in (("steps", False), ("no", True)):
        seen.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
        seen.on_save(SimpleNamespace(output_dir=str(folder), eval_strategy=strategy), state, None)
        assert (folder / "report.html").exists() == written


def test_in_code_of_ones_own(tmp_path, tiny_model):
    """Without a recipe and a script the callback keeps the folder of a run, and its report is complete."""
    for name in ("train_results.json", "held_out.json"):  # of a run before
        (tmp_path / name).write_text("{}")
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "learning_rate": 1e-2}
    args = NCAConfig(output_dir=str(tmp_path), beta=0.3, alpha=0.2, report_to="none", disable_tqdm=True, **settings)
    train, held_out = Dataset.from_list(ROWS[:5]), Dataset.from_list(ROWS[5:])
    trainer = NCATrainer(model=tiny_model, args=args, train_dataset=train, eval_dataset=held_out)
    trainer.add_callback(ReportCallback(trainer))
    trainer.train()
    run = read_run(tmp_path)
    assert run.recipe["model_name_or_path"] == tiny_model
    assert {"beta", "alpha", "learning_rate"} <= set(run.environment["given"])
    assert run.curve_from_start("eval_loss")[1][0] == pytest.approx(2 * np.log(2))
    assert run.data_report["eval"]["k_histogram"] == {"2": 3}
    page = Page(tmp_path / "report.html")
    assert "Finished" in page.text
    assert "on 3 held-out prompts" in page.text
    (tmp_path / "report.html").unlink()
    trainer.evaluate()
    assert (tmp_path / "report.html").exists(), "an evaluation after training is in the report too"


def test_an_alarm_is_logged_when_it_is_new_or_grows(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("alignment.report.html.draw_all", lambda groups: [])
    folder, handler = write_run(tmp_path / "falling", best=-0.05), SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(eval_metrics={}, args=SimpleNamespace(recipe={"beta": 0.1}), callback_handler=handler)
    seen, lines = ReportCallback(trainer), history(-0.05)
    seen._is_training = True
    state = SimpleNamespace(is_world_process_zero=True, log_history=lines, global_step=10)
    args = SimpleNamespace(output_dir=str(folder), eval_strategy="no")
    marks = []
    for logps in (-5000.0, -5000.0, -50.0, -50.0):
        lines[-1] |= {"eval_logps/chosen": logps}
        seen.on_save(args, state, None)
        marks.append([record.message[:3] for record in caplog.records])
        caplog.clear()
    assert marks == [["The"], [], ["!!!"], []]


def test_overwriting_removes_the_events_of_the_run_before(tmp_path):
    events = tmp_path / "runs" / "Nov27_host" / "events.out.tfevents.1.host"
    notes = tmp_path / "runs" / "Nov27_host" / "notes.txt"
    for overwrite in (False, True):
        events.parent.mkdir(parents=True, exist_ok=True)
        events.touch()
        notes.touch()
        output.start(str(tmp_path), {"beta": 0.1}, {}, {}, overwrite=overwrite)
        assert events.exists() != overwrite
        assert notes.exists()


def test_evaluations_leave_training_as_it_is(tmp_path):
    rows, curves = reward_rows(12), []
    for evaluated in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(tmp_path, rows, eval_rows=reward_rows(3), **evaluated)
        trainer.train()
        curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert curves[0] == curves[1], "to the last digit"


def test_evaluations_in_training_take_the_first_rows():
    trainer = SimpleNamespace(eval_dataset=Dataset.from_list([{"i": i} for i in range(5)]))
    for most, left in ((None, 5), (2, 2), (9, 5)):
        run = SimpleNamespace(eval_prompts_in_training=most)
        with training(SimpleNamespace(configs=SimpleNamespace(run=run)), trainer):
            assert trainer.eval_dataset["i"] == [*range(left)]
        assert len(trainer.eval_dataset) == 5
