"""Verdicts from a judge that fails, is killed and costs money; the evaluators' files; judges without an endpoint."""

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from alignment.errors import UserError
from alignment.evaluation import endpoint as module
from alignment.evaluation.endpoint import EndpointConfig
from alignment.evaluation.held_out import bootstrap_interval
from alignment.evaluation.judge import VerdictSettings, open_judge
from alignment.evaluation.judge_alpaca_eval import compare_alpaca_eval, is_flipped, preference_of
from alignment.evaluation.judge_mt_bench import grade_mt_bench, rating_of
from alignment.resumable import content_hash
from tests.conftest import ROOT, SHARED, needs_shared
from tests.scripts import read, script, write
from tests.tiny import tiny_config, tiny_tokenizer

MT_BENCH = SHARED / "data" / "mt_bench"
KEY = "sk-never-written-anywhere"
FAILURES = ("500", "429", "no JSON", "closed", "no choices", "cut", "no text", "late")


class Judge(BaseHTTPRequestHandler):
    """A chat endpoint; how it behaves stands in `server.state`."""

    def do_POST(self):
        state = self.server.state
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with state.lock:
            state.calls.append(body)
            state.keys.add(self.headers.get("Authorization"))
            failure = state.fail(len(state.calls), body)
        time.sleep(0.3 if failure == "late" else state.delay)
        if failure == "closed":
            self.connection.close()
        elif failure in ("no JSON", "no choices", "no text"):
            broken = {
                "no JSON": "<html>",
                "no choices": "{}",
                "no text": '{"choices": [{"message": {"content": null}}]}',
            }
            self.reply(200, broken[failure])
        elif failure and failure.isdigit():
            self.reply(int(failure), f"no, {KEY}!", {"Location": "http://127.0.0.1:9/", "Retry-After": "0.01"})
        else:
            reply = {"choices": [state.answer(body)], "usage": {"total_tokens": 10} if state.has_usage else None}
            self.reply(200, json.dumps(reply), cut=5 if failure == "cut" else 0)
            if not failure:
                with state.lock:
                    state.answered.append(content_hash(body))

    def reply(self, status, text, headers=(), cut=0):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode()[: len(text.encode()) - cut])

    def log_message(self, *args):
        pass


def rate(body):
    """A rating that depends on the prompt; none for one prompt in five."""
    digest = hashlib.sha256(body["messages"][-1]["content"].encode()).digest()
    return said("I cannot say." if digest[0] % 5 == 0 else f"Well. Rating: [[{digest[1] % 10 + 1}]]")


def said(text, top=None):
    """A completion; `top`: log-probs at its last token, before which it says something else."""
    if top is not None:
        last = {"top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in top.items()]}
        top = {"content": [{"top_logprobs": [{"token": "m", "logprob": 0.0}]}, last]}
    return {"message": {"role": "assistant", "content": text}, "logprobs": top}


@pytest.fixture
def server(monkeypatch):
    """A judge on this machine that answers all calls; `url` is its address."""
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    state = SimpleNamespace(
        lock=threading.Lock(), calls=[], keys=set(), answered=[], delay=0.0, has_usage=True, answer=rate,
        fail=lambda number, body: None,
    )  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as http:
        http.daemon_threads, http.state = True, state
        http.handle_error = lambda *args: None  # clients that have hung up
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        yield state
        http.shutdown()


def every_second(number, body):
    return FAILURES[number // 2 % len(FAILURES)] if number % 2 else None


QUESTIONS = [
    {"question_id": 81 + i, "category": category, "turns": [f"Question {i}, {{x}}?", f"More on {i}?"]}
    for i, category in enumerate(["writing", "math", "coding", "stem", "reasoning", "writing"])
]
PROMPTS = [
    {"name": f"single-{kind}v1{turn}", "system_prompt": f"You are {kind}{turn}.", "prompt_template": template}
    for kind in ("", "math-")
    for turn, template in (
        ("", "Rate [[rating]]: {question} | {answer}" + (" | {ref_answer_1}" if kind else "")),
        ("-multi-turn", "{question_1} | {answer_1} | {question_2} | {answer_2}"
         + (" | {ref_answer_1} | {ref_answer_2}" if kind else "")),
    )
]  # fmt: skip


def answers_of(model, questions):
    """An answer file's rows; a text depends on model, question and turn, and has braces."""
    return [
        {
            "question_id": q["question_id"], "answer_id": "a", "model_id": model, "tstamp": 1.0,
            "choices": [{"index": 0, "turns": [f"{model} on {q['question_id']}.{t} {{answer}}" for t in (1, 2)]}],
        }
        for q in questions
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """MT-bench's files, by the flags that name them."""
    return {
        "questions": write(tmp_path / "question.jsonl", QUESTIONS),
        "answers": write(tmp_path / "tiny.jsonl", answers_of("tiny", QUESTIONS)),
        "references": write(tmp_path / "gpt-4.jsonl", answers_of("gpt-4", QUESTIONS)),
        "judge_prompts": write(tmp_path / "judge_prompts.jsonl", PROMPTS),
    }


def grade(files, tmp_path, server, *answers, threads=4, **config):
    return grade_mt_bench(
        files["questions"], list(answers) or [files["answers"]], files["judge_prompts"], files["references"],
        str(tmp_path / "out"), EndpointConfig(server.url, "org/judge", threads=threads, **config), VerdictSettings(64),
    )  # fmt: skip


def judgments(tmp_path):
    return read(tmp_path / "out" / "model_judgment" / "org_judge_single.jsonl")


def test_a_judge_that_fails_every_second_call_loses_nothing(files, tmp_path, server, capsys):
    server.fail = every_second
    printed = grade(files, tmp_path, server, timeout=0.15, max_retries=50)
    rows = judgments(tmp_path)
    assert [(row["question_id"], row["turn"]) for row in rows] == [(81 + i, turn) for i in range(6) for turn in (1, 2)]
    assert Counter(server.answered).most_common(1)[0][1] == 1, "no verdict is asked for twice"
    assert len(server.answered) == 12
    assert len(server.calls) >= 23, "every second one failed"
    assert f"{len(server.calls)} calls and 120 tokens" in printed
    grade(files, tmp_path, server)
    assert len(server.answered) == 12, "nor by a second run"
    assert judgments(tmp_path) == rows
    assert server.keys == {f"Bearer {KEY}"}
    shown = "".join(capsys.readouterr()) + printed
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in shown
    assert KEY.encode() not in written


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_passes(files, tmp_path, server, failure):
    server.fail = lambda number, body: failure if number <= 3 else None
    grade(files, tmp_path, server, timeout=0.15, threads=1)
    assert len(judgments(tmp_path)) == 12
    assert len(server.calls) == 15


def test_fastchats_judgments_and_their_means(files, tmp_path, server):
    other = write(tmp_path / "other.jsonl", answers_of("other", QUESTIONS))
    printed = grade(files, tmp_path, server, files["answers"], other)
    rows = judgments(tmp_path)
    assert [list(row) for row in rows] == [
        ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    ] * 24
    by_place = {(row["model"], row["question_id"], row["turn"]): row for row in rows}
    math_1, math_2, writing = (by_place["tiny", *place] for place in ((82, 1), (82, 2), (81, 2)))
    assert math_1["judge"] == ["org/judge", "single-math-v1"]
    assert math_1["user_prompt"] == (
        "Rate [[rating]]: Question 1, {x}? | tiny on 82.1 {answer} | gpt-4 on 82.1 {answer}"
    )  # fmt: skip
    assert math_2["judge"] == ["org/judge", "single-math-v1-multi-turn"]
    assert math_2["user_prompt"].endswith("| gpt-4 on 82.1 {answer} | gpt-4 on 82.2 {answer}")
    assert writing["judge"] == ["org/judge", "single-v1-multi-turn"]
    assert writing["user_prompt"] == "Question 0, {x}? | tiny on 81.1 {answer} | More on 0? | tiny on 81.2 {answer}"
    assert {body["temperature"] for body in server.calls} == {0}
    assert {body["model"] for body in server.calls} == {"org/judge"}
    systems = {body["messages"][1]["content"]: body["messages"][0] for body in server.calls}
    assert systems[math_2["user_prompt"]] == {"role": "system", "content": "You are math--multi-turn."}
    for row in rows:
        text = rate({"messages": [{"content": row["user_prompt"]}]})["message"]["content"]
        assert row["judgment"] == text
        assert row["score"] == (int(re.search(r"\d+", text)[0]) if "[[" in text else -1)
    lines = [line.split() for line in printed.splitlines()]
    table = {tuple(cells[:-2]): cells[-2:] for cells in lines[1:-1]}
    assert table[()] == ["tiny", "other"]
    of_category = {q["question_id"]: q["category"] for q in QUESTIONS}
    for column, model in enumerate(("tiny", "other")):
        rated = [row for row in rows if row["model"] == model and row["score"] != -1]
        for name, kept in {
            ("turn", "1"): [row["score"] for row in rated if row["turn"] == 1],
            ("mean",): [row["score"] for row in rated],
            ("writing",): [row["score"] for row in rated if of_category[row["question_id"]] == "writing"],
        }.items():
            assert table[name][column] == f"{np.mean(kept):.2f}"
        assert table["no", "rating"][column] == str(12 - len(rated))
    assert set(table["no", "rating"]) != {"0"}
    grade(files, tmp_path, server, other)
    assert {row["model"] for row in judgments(tmp_path)} == {"tiny", "other"}, "verdicts on other models stay"


@needs_shared
def test_the_prompts_of_mt_bench_are_filled_as_fastchat_fills_them(tmp_path, server):
    questions, templates = read(MT_BENCH / "question.jsonl"), read(MT_BENCH / "judge_prompts.jsonl")
    templates = {row["name"]: row["prompt_template"] for row in templates}
    references = {
        row["question_id"]: row["choices"][0]["turns"] for row in read(MT_BENCH / "reference_answer/gpt-4.jsonl")
    }
    answers = write(tmp_path / "tiny.jsonl", answers_of("tiny", questions))
    names = {"questions": "question", "judge_prompts": "judge_prompts", "references": "reference_answer/gpt-4"}
    grade({flag: f"{MT_BENCH}/{name}.jsonl" for flag, name in names.items()}, tmp_path, server, answers)
    by_place = {(row["question_id"], row["turn"]): row for row in judgments(tmp_path)}
    assert len(by_place) == 160
    for question in questions:
        number, (one, two) = question["question_id"], question["turns"]
        math = question["category"] in ("math", "reasoning", "coding")
        kind = "single-math-v1" if math else "single-v1"
        answer = [f"tiny on {number}.{t} {{answer}}" for t in (1, 2)]
        reference = {f"ref_answer_{i + 1}": references[number][i] for i in (0, 1)} if math else {}
        first = templates[kind].format(question=one, answer=answer[0], **reference)
        both = {"question_1": one, "question_2": two, "answer_1": answer[0], "answer_2": answer[1]}
        assert by_place[number, 1]["user_prompt"] == first
        assert by_place[number, 2]["user_prompt"] == templates[f"{kind}-multi-turn"].format(**both, **reference)


def test_a_sigkill_in_the_middle(files, tmp_path, server):
    server.delay = 0.03
    process = multiprocessing.get_context("fork").Process(
        target=grade, args=(files, tmp_path, server), kwargs={"threads": 2}
    )
    process.start()
    part = tmp_path / "out" / "verdicts" / "org_judge.jsonl.part"
    deadline = time.monotonic() + 30
    while process.is_alive() and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 4:
            break
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {entry["key"] for entry in read(part)[1:]}
    assert 4 <= len(kept) < 12
    with part.open("ab") as file:
        file.write(b'{"key": "torn')
    time.sleep(0.1)  # what was under way ends
    before = len(server.answered)
    grade(files, tmp_path, server)
    assert len(judgments(tmp_path)) == 12
    assert not kept & set(server.answered[before:]), "what stands on disk is not asked for again"
    assert len(server.answered) == before + 12 - len(kept)


@pytest.mark.parametrize(("budget", "most"), [({"max_calls": 5}, 5), ({"max_cost": 35}, 4)])
def test_a_budget_stops_the_run_and_the_next_goes_on(files, tmp_path, server, budget, most):
    printed = grade(files, tmp_path, server, threads=1, **budget)
    assert len(server.calls) == most
    assert len(judgments(tmp_path)) == most
    (flag, limit), left = *budget.items(), 12 - most
    assert f"STOPPED: --{flag} {limit} is used up" in printed
    assert f"{left} of 12 verdicts are left; run the same command again" in printed
    grade(files, tmp_path, server, threads=1, **budget)
    grade(files, tmp_path, server)
    assert len(server.calls) == len(set(server.answered)) == 12
    assert "STOPPED" not in grade(files, tmp_path, server, max_calls=0)


def test_failed_calls_count_too(files, tmp_path, server):
    server.fail = every_second
    printed = grade(files, tmp_path, server, max_calls=7, timeout=0.15)
    assert len(server.calls) == 7
    assert "7 calls and " in printed


def test_a_cost_that_cannot_be_counted_is_no_budget(files, tmp_path, server):
    server.has_usage = False
    with pytest.raises(UserError, match="--max_cost: the endpoint does not tell .*; use --max_calls"):
        grade(files, tmp_path, server, max_cost=100, threads=1)
    assert len(server.calls) == 1
    grade(files, tmp_path, server)
    assert len(server.calls) == len(set(server.answered)) == 12, "what came before is kept"


@pytest.mark.parametrize("status", ["401", "404", "302"])
def test_what_every_request_would_meet_ends_the_run(files, tmp_path, server, status):
    server.fail = lambda number, body: status
    with pytest.raises(UserError, match=rf"says HTTP {status}: no, \*\*\*!; check URL.*OPENAI_API_KEY is set") as error:
        grade(files, tmp_path, server, threads=1)
    assert KEY not in str(error.value)
    assert len(server.calls) == 1


def test_a_refused_request_costs_only_itself(files, tmp_path, server, capsys):
    server.fail = lambda number, body: "400" if re.search(r"on 8[123]\.2", str(body)) else None
    with pytest.raises(UserError, match=r"3 of 12 verdicts are missing \(HTTP 400: no, .*; those that came are saved"):
        grade(files, tmp_path, server, threads=1)
    assert len(judgments(tmp_path)) == 9, "three are many only in a row"
    assert len(server.calls) == 12, "none is sent again"
    assert "mean" in capsys.readouterr().out
    server.fail = lambda number, body: None
    grade(files, tmp_path, server)
    assert len(server.calls) == 15


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("Unsupported parameter: 'max_tokens'", "; try --max_completion_tokens"),
        ("'temperature' does not support 0", "; try --judge_temperature none"),
        ("'logprobs' is not supported", "; try --no_logprobs"),
        ("no", "HTTP 400: no"),
    ],
)
def test_a_refused_setting_is_answered_by_its_flag(text, flag):
    endpoint = module.Endpoint(EndpointConfig("http://host/v1", "judge"), SimpleNamespace(entries=[]))
    error = HTTPError("http://host/v1", 400, "", {}, io.BytesIO(text.encode()))
    assert str(endpoint._status_error(error)).endswith(flag)


def test_an_endpoint_that_stays_away_is_given_up(files, tmp_path, server):
    server.fail = lambda number, body: "503" if number > 2 else None
    with pytest.raises(UserError, match=r"10 of 12 verdicts are missing \(HTTP 503"):
        grade(files, tmp_path, server, threads=1, max_retries=2)
    assert len(server.calls) == 2 + 3 * 3
    assert len(judgments(tmp_path)) == 2
    nobody = SimpleNamespace(url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"10 of 12 verdicts are missing \(http://127.0.0.1:9/v1: .*refused"):
        grade(files, tmp_path, nobody, max_retries=1)


def test_two_judges_do_not_share_a_folder(files, tmp_path, server):
    config = EndpointConfig(server.url, "org/judge")
    with open_judge(str(tmp_path / "out"), config), pytest.raises(UserError, match="another judge is at work"):
        grade(files, tmp_path, server)
    grade(files, tmp_path, server)


# --- AlpacaEval

TEMPLATE = (
    "<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n"
    '{ "instruction": """{instruction}""", "m": """{output_1}""", "M": """{output_2}""" }\n<|im_end|>\n'
)


def outputs_of(generator, num_rows=40, **columns):
    return [
        {"instruction": f"Do {i}.", "output": f"{generator} {i} " + "x" * (i % 7), "generator": generator, **columns}
        for i in range(num_rows)
    ]


@pytest.fixture
def pairs(tmp_path):
    """Outputs of a model and of the reference, and the judge's prompt, by the flags that name them."""
    ours, theirs = outputs_of("ours")[::-1], outputs_of("theirs", dataset="helpful_base")
    ours[5]["output"] = theirs[34]["output"]  # of one instruction
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    named = {"answers": "ours.json", "reference_outputs": "theirs.json", "judge_prompts": "prompt.txt"}
    return {flag: str(tmp_path / name) for flag, name in named.items()}


def compare(pairs, tmp_path, server, seed=0, **config):
    config = EndpointConfig(server.url, "org/judge", **config)
    files = (pairs["answers"], pairs["reference_outputs"], pairs["judge_prompts"])
    return compare_alpaca_eval(*files, str(tmp_path / "out"), config, VerdictSettings(1), seed)


def annotations(tmp_path):
    return json.loads((tmp_path / "out" / "ours" / "org_judge" / "annotations.json").read_text())


def prefers_ours(body):
    """0.9 for the model on even instructions, 0.2 on odd ones, wherever its output stands; and says nothing on 7."""
    text = body["messages"][1]["content"]
    number = int(re.search(r"Do (\d+)\.", text)[1])
    ours = 0.9 if number % 2 == 0 else 0.2
    m = ours if '"m": """ours' in text else 1 - ours
    if number == 7:
        return said("?", {"?": 0.0})
    return said("m" if m > 0.5 else "M", {"m": math.log(m / 2), "M": math.log((1 - m) / 2), "Both": -9.0})


def test_alpaca_evals_annotations_and_win_rate(pairs, tmp_path, server):
    server.answer, server.fail = prefers_ours, every_second
    printed = compare(pairs, tmp_path, server, timeout=0.15, max_retries=50)
    rows = annotations(tmp_path)
    assert [list(row) for row in rows] == [[
        "instruction", "output_1", "output_2", "generator_1", "generator_2", "dataset", "annotator", "preference"
    ]] * 40  # fmt: skip
    assert [row["instruction"] for row in rows] == [f"Do {i}." for i in range(40)], "the reference's order"
    assert rows[3]["output_1"].startswith("theirs 3")
    assert rows[3]["output_2"].startswith("ours 3")
    expected = [1.9 if i % 2 == 0 else 1.2 for i in range(40)]
    expected[34], expected[7] = 1.5, None
    assert [row["preference"] for row in rows] == [p if p is None else pytest.approx(p) for p in expected]
    assert {(row["generator_1"], row["generator_2"], row["dataset"], row["annotator"]) for row in rows} == {
        ("theirs", "ours", "helpful_base", "org/judge")
    }
    assert len(server.answered) == len(set(server.answered)) == 39, "equal outputs need no judge"
    body = server.calls[0]
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 5)
    wins = 100 * np.array([p - 1 for p in expected if p is not None])
    error = math.sqrt(((wins - wins.mean()) ** 2).sum() / 38 / 39)
    assert f"{wins.mean():.2f} % (standard error {error:.2f}), 39 verdicts, 1 replies without one" in printed
    lengths = [np.mean([len(row[name]) for row in rows]) for name in ("output_2", "output_1")]
    assert "{:.0f} characters, the reference's {:.0f}".format(*lengths) in printed
    assert "length-controlled  needs all 805" in printed


def test_the_order_is_drawn_by_the_instruction(pairs, tmp_path, server):
    server.answer = lambda body: said(" the best is M.")  # whatever stands second, and without probabilities
    compare(pairs, tmp_path, server)
    rows = annotations(tmp_path)
    flips = {row["instruction"]: is_flipped(row["instruction"], 0) for row in rows}
    assert 10 < sum(flips.values()) < 30
    for row in rows:
        assert row["preference"] == (
            1.5 if row["instruction"] == "Do 34." else 1.0 if flips[row["instruction"]] else 2.0
        )
    for body in server.calls:
        text = body["messages"][1]["content"]
        flipped = flips[re.search(r"Do \d+\.", text)[0]]
        assert ('"m": """ours' in text) == flipped
    compare(pairs, tmp_path, server, seed=1)
    assert len(server.answered) == len(set(server.answered)) > 39 + 5, "another seed has other orders"


def test_a_budget_leaves_out_what_has_no_verdict(pairs, tmp_path, server):
    server.answer = prefers_ours
    printed = compare(pairs, tmp_path, server, max_calls=9, threads=1)
    assert "STOPPED: --max_calls 9 is used up; 30 of 40 verdicts are left" in printed
    assert "length-controlled" not in printed
    assert len(annotations(tmp_path)) == 10, "with the equal pair"


def test_the_length_controlled_win_rate_is_alpaca_evals(pairs, tmp_path, server, monkeypatch):
    monkeypatch.setattr("alignment.evaluation.judge_alpaca_eval.OFFICIAL_INSTRUCTIONS", 40)
    server.answer = prefers_ours
    assert "needs the package alpaca_eval" in compare(pairs, tmp_path, server)
    seen = []

    def stand_in(table, save_weights_dir="auto"):
        seen.append((table, save_weights_dir))
        if len(seen) == 2:
            raise OSError("no Hub")
        return {"length_controlled_winrate": 12.345}

    modules = {name: ModuleType(name) for name in ("alpaca_eval", "alpaca_eval.metrics")}
    modules["alpaca_eval.metrics"].get_length_controlled_winrate = stand_in
    for name, stub in modules.items():
        monkeypatch.setitem(sys.modules, name, stub)
    assert "length-controlled  12.35 %" in compare(pairs, tmp_path, server)
    table, folder = seen[0]
    assert folder is None
    assert list(table["instruction"]) == [f"Do {i}." for i in range(40)]
    assert table.index.tolist() == list(range(40)), "alpaca_eval knows an instruction by its place"
    assert "alpaca_eval could not compute it: OSError('no Hub')" in compare(pairs, tmp_path, server)


# --- Judges without an endpoint

FUNCTIONS = """
def length(prompts, completions, **columns):
    return [len(c[0]["content"]) for c in completions]


def of_math(prompts, completions, category, turn, **columns):
    assert all(len(p) == 2 * t - 1 for p, t in zip(prompts, turn))
    return [len(c[0]["content"]) if k == "math" else None for c, k in zip(completions, category)]


def never(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture
def two(tmp_path):
    """Two models' answers to MT-bench, the second's longer by one to twelve letters."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    longer = answers_of("longer", QUESTIONS)
    for i, row in enumerate(longer):
        row["choices"][0]["turns"] = [f"tiny{'!' * (2 * i + t)}{text[6:]}" for t, text in
                                      enumerate(row["choices"][0]["turns"], start=1)]  # fmt: skip
    return [write(tmp_path / "tiny.jsonl", answers_of("tiny", QUESTIONS)), write(tmp_path / "longer.jsonl", longer)]


def local(monkeypatch, capsys, tmp_path, *flags):
    code = script(monkeypatch, "judge.py", "--output_dir", tmp_path / "out", *flags)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in printed.out.splitlines() if "  " in line}


def test_a_reward_function_compares_two_models(two, files, tmp_path, monkeypatch, capsys):
    flags = ["--benchmark=mt_bench", "--questions", files["questions"], "--answers", *two]
    said = local(monkeypatch, capsys, tmp_path, *flags, "--reward_function", f"{tmp_path}/rewards.py:length")
    differences = np.array([2 * i + 1.5 for i in range(6)])
    low, high = bootstrap_interval(differences)
    assert said["difference (95 %)"] == f"+6.500 [{low:+.3f}, {high:+.3f}], 6 questions"
    assert said["verdict"].startswith("improved")
    assert float(said["longer"]) - float(said["tiny"]) == pytest.approx(6.5)
    scored = read(tmp_path / "out" / "scored" / "longer.jsonl")
    assert len(scored) == 12
    assert [turn["role"] for turn in scored[1]["prompt"]] == ["user", "assistant", "user"]
    said = local(monkeypatch, capsys, tmp_path, *flags[:-2], *two[::-1], "--reward_function",
                 f"{tmp_path}/rewards.py:of_math")  # fmt: skip
    assert said["difference (95 %)"] == "-3.500 [-3.500, -3.500], 1 questions"
    assert said["verdict"].startswith("WORSE")
    never = ["--reward_function", f"{tmp_path}/rewards.py:never"]
    assert script(monkeypatch, "judge.py", "--output_dir", tmp_path / "out", *flags, *never) == 2
    assert "no question has a score in both" in capsys.readouterr().err


def test_a_reward_model_compares_two_models(pairs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reward"
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(num_labels=1, initializer_range=0.3)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    flags = ["--benchmark=alpaca_eval", "--reward_model", folder, "--batch_size=40", "--answers"]
    said = local(monkeypatch, capsys, tmp_path, *flags, pairs["reference_outputs"], pairs["answers"])
    files = (tmp_path / "out" / "scored" / f"{name}.jsonl" for name in ("ours", "theirs"))
    ours, theirs = ({row["instruction"]: row["scores"][0] for row in read(file)} for file in files)
    differences = np.array([ours[name] - theirs[name] for name in theirs])
    assert differences.std() > 0.01
    low, high = bootstrap_interval(differences)
    assert said["difference (95 %)"] == f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}], 40 questions"


# --- The command line

ENDPOINT = ["--base_url=http://127.0.0.1:9/v1", "--model=judge", "--judge_prompts={judge_prompts}"]
MT_FLAGS = ["--benchmark=mt_bench", "--questions={questions}", "--answers={answers}", "--references={references}"]
OF_FUNCTION = "--reward_function=rewards.py:length"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MT_FLAGS, "mt_bench needs --base_url for this judge"),
        ([*MT_FLAGS, *ENDPOINT, "--base_url=localhost:8000"], "--base_url: 'localhost:8000' is no URL"),
        ([*MT_FLAGS, *ENDPOINT, "--base_url=http://me:secret@host/v1"], "a password in it would be written to logs"),
        ([*MT_FLAGS, *ENDPOINT, "--threads=0"], "--threads: must be at least 1, got 0"),
        ([*MT_FLAGS, *ENDPOINT, "--questions=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([*MT_FLAGS, *ENDPOINT, "--judge_prompts={questions}"], "line 1: lacks name, system_prompt, prompt_template"),
        ([*MT_FLAGS, *ENDPOINT, "--judge_prompts=some.jsonl"], "some.jsonl: no prompt named single-v1-multi-turn"),
        ([*MT_FLAGS, *ENDPOINT, "--judge_prompts=bad.jsonl"], "bad.jsonl, single-v1: the prompt has no {question}"),
        ([*MT_FLAGS[:3], *ENDPOINT], "--references: needed for the 3 questions of math, reasoning, coding"),
        ([*MT_FLAGS, *ENDPOINT, "--answers=few.jsonl"], "few.jsonl: no answer to 1 of 6 questions, the first 86"),
        ([*MT_FLAGS, *ENDPOINT, "--answers=short.jsonl"], "choices[0].turns must be a list of 2 texts or more"),
        ([*MT_FLAGS, *ENDPOINT, "--answers", "{answers}", "{answers}"], "--answers: two files are of one model"),
        ([*MT_FLAGS, *ENDPOINT, OF_FUNCTION], "--base_url is one judge and --reward_function another"),
        ([*MT_FLAGS, OF_FUNCTION], "compares two models, and 1 files are given"),
        ([*MT_FLAGS, OF_FUNCTION, "--answers", "{answers}", "{answers}"], "both files are of tiny"),
        (["--benchmark=alpaca_eval", *MT_FLAGS[1:], *ENDPOINT], "--questions says nothing to alpaca_eval"),
        (["--benchmark=alpaca_eval", "--answers=a.json", *ENDPOINT], "alpaca_eval needs --reference_outputs"),
        (["--benchmark=alpaca_eval", "--answers=a.json", "--reference_outputs=b.json", *ENDPOINT],
         "a.json: none of its instructions is in b.json"),
        (["--benchmark=alpaca_eval", "--answers=a.json", "--reference_outputs=a.json", *ENDPOINT],
         "the prompt has no {instruction}"),
        (["--benchmark=alpaca_eval", "--answers=a.json", "--reference_outputs={questions}", *ENDPOINT],
         "line 1: lacks instruction, output, generator"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    write(tmp_path / "some.jsonl", PROMPTS[:1])
    write(tmp_path / "bad.jsonl", [PROMPTS[0] | {"prompt_template": "{answer}"}])
    write(tmp_path / "few.jsonl", answers_of("tiny", QUESTIONS[:5]))
    short = answers_of("tiny", QUESTIONS)
    short[2]["choices"][0]["turns"] = ["one"]
    write(tmp_path / "short.jsonl", short)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": name, "output": "o", "generator": name}]))
    filled = [flag.format(**files) for flag in flags]
    assert script(monkeypatch, "judge.py", "--output_dir=out", *filled) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("<think>\nA first idea is [[3]].\n</think>\n\nRating: [[8]]", 8),
        ("Perhaps [[3]]?\n</think>\nRating: [[8]]", 8),
        ("<think>Is it [[3]]? Or", -1),
        ("<thinking>[[1]]</thinking> <reasoning>[[2]]</reasoning> [[4]]", 4),
        ("[THINK][[1]][/THINK][[9]]", 9),
        ("From [[1]] to [[10]]: [[6]]", 6),
        ("It cites [1] and [2]. Rating: 9", -1),
        ("It cites [1].\nRating: [7]", 7),
        ("My rating is **[7.5]**.", 7.5),
        ("[[ 7 ]]", 7),
        ("[[7/10]]", 7),
        ("[[7,5]]", 7.5),
        ("[[70/100]]", -1),
        ("[[85]]", -1),
        ("[[0]]", -1),
        ("[[10]]", 10),
        ("Rating: 8/10", -1),
        ("", -1),
    ],
)
def test_the_last_rating_after_the_thinking_counts(text, rating):
    assert rating_of(text) == rating


@pytest.mark.parametrize(
    ("text", "top", "preference"),
    [
        ("M", {" M": math.log(0.5), "M": math.log(0.1), " m": math.log(0.2)}, 1.75),
        ("m", {"\u0120m": 0.0, "\u2581M": -math.inf}, 1.0),
        ("<think>m or M?</think>\nM", None, 2.0),
        ("<think>M it is: M</think> **m**", None, 1.0),
        ("<think>m or M", None, None),
        ("Both are fine.", {"fine": 0.0}, None),
    ],
)
def test_the_preference_is_read_after_the_thinking(text, top, preference):
    assert preference_of({"text": text, "top_logprobs": top}, flipped=False) == preference


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"message": {"content": [{"type": "text", "text": "[[5"}, {"type": "text", "text": "]]"}]}}, "[[5]]"),
        ({"message": {"content": None, "refusal": "I cannot."}}, ""),
        ({"message": {"content": None, "reasoning_content": "Hm"}, "finish_reason": "length"}, ""),
    ],
)
def test_replies_of_other_shapes_are_read(choice, text):
    assert module.read_reply(json.dumps({"choices": [choice]}).encode())["text"] == text


def test_what_newer_judges_refuse_need_not_be_sent(files, pairs, tmp_path, server, monkeypatch, capsys):
    flags = ["--output_dir", tmp_path / "out", "--base_url", server.url, "--model=org/judge"]
    of_mt_bench = ["--benchmark=mt_bench", *flags, *(f"--{name}={path}" for name, path in files.items())]
    of_alpaca_eval = ["--benchmark=alpaca_eval", *flags, *(f"--{name}={path}" for name, path in pairs.items())]
    newer = ["--max_completion_tokens=4096", "--judge_temperature=none"]
    assert script(monkeypatch, "judge.py", *of_mt_bench, *newer) == 0
    sent = [{key: body[key] for key in body if key not in ("messages", "model")} for body in server.calls]
    assert sent == [{"max_completion_tokens": 4096}] * 12
    assert script(monkeypatch, "judge.py", *of_mt_bench, *newer) == 0
    assert len(server.calls) == 12
    assert script(monkeypatch, "judge.py", *of_mt_bench, "--judge_temperature=0.5") == 0
    assert len(server.calls) == 24, "verdicts at another temperature are others"
    assert server.calls[-1]["temperature"] == 0.5
    server.answer = lambda body: said("M")
    assert script(monkeypatch, "judge.py", *of_alpaca_eval, "--no_logprobs", *newer) == 0
    assert not {"logprobs", "top_logprobs", "temperature", "max_tokens"} & set(server.calls[-1])
    for bad, message in (
        (["--no_logprobs"], "--no_logprobs says nothing to mt_bench"),
        (["--max_tokens=5", "--max_completion_tokens=5"], "two names of one thing"),
        (["--max_completion_tokens=0"], "--max_completion_tokens: must be at least 1, got 0"),
        (["--judge_temperature=-1"], "invalid temperature value: '-1'"),
    ):
        assert script(monkeypatch, "judge.py", *of_mt_bench, *bad) == 2
        assert message in capsys.readouterr().err


def test_the_script(files, pairs, tmp_path, server, monkeypatch, capsys):
    flags = ["--output_dir", tmp_path / "out", "--base_url", server.url, "--model=org/judge"]
    of_mt_bench = [f"--{name}={path}" for name, path in files.items()]
    assert script(monkeypatch, "judge.py", "--benchmark=mt_bench", *flags, *of_mt_bench) == 0
    assert len(judgments(tmp_path)) == 12
    assert {body["max_tokens"] for body in server.calls} == {2048}
    server.answer = prefers_ours
    of_alpaca_eval = [f"--{name}={path}" for name, path in pairs.items()]
    assert script(monkeypatch, "judge.py", "--benchmark=alpaca_eval", *flags, *of_alpaca_eval) == 0
    assert server.calls[-1]["max_tokens"] == 1
    assert "win rate" in capsys.readouterr().out
    monkeypatch.setenv("OTHER", "bad\nkey")
    assert script(monkeypatch, "judge.py", "--benchmark=mt_bench", *flags, *of_mt_bench, "--api_key_env=OTHER") == 2
    printed = capsys.readouterr().err
    assert "OTHER: holds characters that no key has" in printed
    assert "bad" not in printed


def documented():
    """Commands of docs/evaluation.md and of the scripts themselves, as words."""
    pages = [ROOT / "docs" / "evaluation.md"]
    pages += [ROOT / "alignment-handbook" / "scripts" / name for name in ("generate_answers.py", "judge.py")]
    text = re.sub(r"\\\n *", " ", "\n".join(page.read_text() for page in pages))
    return [
        shlex.split(m[0]) for m in re.finditer(r"alignment-handbook/scripts/(generate_answers|judge)\.py --.*", text)
    ]


@pytest.mark.parametrize("command", documented(), ids=lambda command: " ".join(command)[-40:])
def test_every_documented_command_parses(command, monkeypatch):
    parse = runpy.run_path(str(ROOT / command[0]))["_parse"]
    monkeypatch.setattr(sys, "argv", command)
    parse()
