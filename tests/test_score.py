"""Responses in, scores out: functions, reward models, their sum, and that a killed run gives the same bytes."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from alignment.errors import UserError
from alignment.sampling import score as module
from alignment.sampling.reward_function import call_reward_function, load_reward_function
from alignment.sampling.reward_model import RewardModel
from alignment.sampling.score import Scorer, score_file
from tests.scripts import Killed, read, script, write
from tests.tiny import save_tiny_model, tiny_config, tiny_tokenizer

FUNCTIONS = '''
CALLS = []


def words(prompts, completions, **columns):
    assert all(c[0]["role"] == "assistant" and len(c) == 1 for c in completions)
    assert all(p[-1]["role"] == "user" for p in prompts)
    CALLS.append(len(completions))
    return [len(c[0]["content"].split()) for c in completions]


def right(completions, answer, **columns):
    """Whether the answer occurs; does not apply where there is none."""
    return [None if a is None else float(a in c[0]["content"]) for c, a in zip(completions, answer)]


def never(completions, **columns):
    return [None] * len(completions)


def thirds(completions, **columns):
    return [len(c[0]["content"]) / 3 for c in completions]


def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)


def not_a_number(completions, **columns):
    return [float("nan") if c[0]["content"] == "a b c" else 1.0 for c in completions]


def text(completions, **columns):
    return ["good"] * len(completions)
'''
ROWS = [
    {"prompt": "Say a.", "responses": ["a", "a b", "c"], "answer": "a", "sources": ["m"] * 3},
    {"prompt": [{"role": "user", "content": "Say something long. " * 9}], "responses": ["a b c"], "answer": None},
    {"prompt": "Nothing.", "responses": []},
    {"prompt": "Say c.", "responses": ["b", "c d e f", "c c", "a", "e"], "answer": "c"},
]


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    return f"{tmp_path}/rewards.py"


@pytest.fixture
def samples(tmp_path):
    return write(tmp_path / "samples.jsonl", ROWS)


def scorers(file, *names):
    return [Scorer.parse(f"{file}:{name}", is_model=False) for name in names]


def test_scores_of_one_function(samples, functions, tmp_path):
    score_file(samples, str(tmp_path / "out.jsonl"), scorers(functions, "words"))
    rows = read(tmp_path / "out.jsonl")
    assert [row["scores"] for row in rows] == [[1, 2, 1], [3], [], [1, 4, 2, 1, 1]]
    assert [list(row) for row in rows] == [[*row, "scores"] for row in ROWS], "all columns stay, as they were"
    assert rows[0]["prompt"] == [{"role": "user", "content": "Say a."}]
    assert "score_parts" not in rows[0]


def test_weights_parts_and_functions_that_do_not_apply(samples, functions, tmp_path):
    score_file(samples, str(tmp_path / "out.jsonl"), scorers(functions, "words=0.5", "right=2", "never"))
    rows = read(tmp_path / "out.jsonl")
    assert [row["scores"] for row in rows] == [[2.5, 3.0, 0.5], [1.5], [], [0.5, 4.0, 3.0, 0.5, 0.5]]
    assert rows[0]["score_parts"] == {
        f"{functions}:words": [1, 2, 1], f"{functions}:right": [1, 1, 0], f"{functions}:never": [None] * 3,
    }  # fmt: skip
    assert rows[1]["score_parts"][f"{functions}:right"] == [None]
    score_file(samples, str(tmp_path / "right.jsonl"), scorers(functions, "right"))
    assert [row["scores"] for row in read(tmp_path / "right.jsonl")] == [[1, 1, 0], [None], [], [0, 1, 1, 0, 0]]


def test_older_scores_are_replaced_and_rounded(samples, functions, tmp_path):
    score_file(samples, str(tmp_path / "first.jsonl"), scorers(functions, "words", "right"))
    score_file(str(tmp_path / "first.jsonl"), str(tmp_path / "out.jsonl"), scorers(functions, "thirds"), digits=2)
    rows = read(tmp_path / "out.jsonl")
    assert rows[0]["scores"] == [0.33, 1.0, 0.33]
    assert "score_parts" not in rows[0]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
TRAJECTORY = [CALL, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "It is 1."}]


def test_a_response_of_several_turns_is_the_list_of_its_messages(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def turns(prompts, completions, tools, **columns):\n"
        "    assert all(named[0]['function']['name'] == 'add' for named in tools)\n"
        "    return [len(c) + len(c[0].get('tool_calls', [])) for c in completions]\n"
        "def called(completions, **columns):\n"
        "    firsts = [c[0].get('tool_calls') for c in completions]\n"
        "    return [calls[0]['function']['arguments']['a'] if calls else None for calls in firsts]\n"
    )
    row = {"prompt": "1?", "responses": [TRAJECTORY, "1", [{"role": "assistant", "content": "2"}]]}
    path = write(tmp_path / "in.jsonl", [row | {"tools": [{"name": "add"}]}])
    scorers = [Scorer.parse(f"{tmp_path}/rewards.py:{name}", False) for name in ("turns", "called")]
    score_file(path, str(tmp_path / "out.jsonl"), scorers)
    (scored,) = read(tmp_path / "out.jsonl")
    assert scored["scores"] == [5.0, 1.0, 1.0]
    assert scored["responses"][0][2] == TRAJECTORY[2]
    assert scored["responses"][1:] == ["1", "2"]
    for bad in ([{"role": "user", "content": "1?"}, *TRAJECTORY], [CALL | {"images": ["x"]}], 7, []):
        path = write(tmp_path / "bad.jsonl", [row | {"responses": ["1", bad]}])
        with pytest.raises(UserError, match="line 1: response 2 "):
            score_file(path, str(tmp_path / "none.jsonl"), scorers[1:])


def test_batches_are_whole_rows_the_longest_first():
    shapes = [(1, 2), (9, 3), (5, 1), (4, 9), (3, 0)]
    rows = [{"prompt": [{"content": "p"}], "responses": ["r" * length] * count} for length, count in shapes]
    assert module._batches(rows, 4) == [[1, 2], [3], [0, 4]]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Folder of a tiny reward model, whose scores are far apart."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(num_labels=1, initializer_range=0.3)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def one_by_one(folder, rows):
    """Scores without batches or padding."""
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = []
    for row in rows:
        turns = [[*row["prompt"], {"role": "assistant", "content": text}] for text in row["responses"]]
        ids = [torch.tensor([tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]]) for turn in turns]
        with torch.no_grad():
            scores.append([model(input_ids=one).logits.item() for one in ids])
    return scores


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_reward_model_scores_batches_as_it_scores_one(samples, reward_model, tmp_path, batch_size):
    model = Scorer.parse(reward_model, is_model=True)
    score_file(samples, str(tmp_path / "out.jsonl"), [model], batch_size=batch_size)
    rows = read(tmp_path / "out.jsonl")
    expected = one_by_one(reward_model, rows)
    for row, scores in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    flat = [score for scores in expected for score in scores]
    assert max(flat) - min(flat) > 0.1


def test_a_reward_model_reads_all_turns_of_a_response(reward_model):
    model, prompt = RewardModel(reward_model, 2), [{"role": "user", "content": "1?"}]
    asked = [{"role": "assistant", "content": "Which?"}, *prompt, {"role": "assistant", "content": "It is 1."}]
    last, whole = (
        [{"prompt": prompt, "responses": ["It is 1."]}],
        [{"prompt": [*prompt, *asked[:2]], "responses": ["It is 1."]}],
    )
    assert model([{"prompt": prompt, "responses": [asked, "It is 1."]}], ["line 1"]) == [
        [pytest.approx(model(whole, ["x"])[0][0]), pytest.approx(model(last, ["x"])[0][0])]
    ]
    calls = [{**CALL, "content": ""}, *TRAJECTORY[1:]]
    with pytest.raises(UserError, match="^line 1: the chat template of .* leaves out calls of a response"):
        model([{"prompt": prompt, "responses": [calls]}], ["line 1"])


def test_a_function_and_a_model_together(samples, functions, reward_model, tmp_path):
    both = [*scorers(functions, "words=2"), Scorer.parse(f"{reward_model}=-1", is_model=True)]
    score_file(samples, str(tmp_path / "out.jsonl"), both)
    for row in read(tmp_path / "out.jsonl"):
        words, model = row["score_parts"].values()
        assert row["scores"] == pytest.approx([2 * w - m for w, m in zip(words, model, strict=True)])


def test_a_tokenizer_without_padding_gets_some(reward_model, tmp_path):
    folder = tmp_path / "no-padding"
    LlamaForSequenceClassification.from_pretrained(reward_model).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": "p"}], "responses": ["a", "a b c d"]}]
    scores = RewardModel(str(folder), batch_size=2)(rows, ["here"])
    assert scores[0] == pytest.approx(one_by_one(reward_model, rows)[0], abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path, reward_model):
    causal = save_tiny_model(tmp_path / "causal")
    with pytest.raises(UserError, match="causal is no reward model: it has 2 outputs, and lacks score.weight"):
        RewardModel(causal, batch_size=2)
    bare = tmp_path / "bare"
    LlamaForSequenceClassification.from_pretrained(reward_model).save_pretrained(bare)
    tiny_tokenizer(chat_template=None).save_pretrained(bare)
    with pytest.raises(UserError, match="has no chat template"):
        RewardModel(str(bare), batch_size=2)
    with pytest.raises(UserError, match="models/nowhere cannot be loaded"):
        RewardModel("models/nowhere", batch_size=2)


def stop_after(monkeypatch, num_batches):
    """Makes scoring die after so many batches; returns the sizes of the batches that were scored."""
    seen = []

    def dies(function, name, rows, locations):
        if len(seen) == num_batches:
            raise Killed
        seen.append(len(rows))
        return call_reward_function(function, name, rows, locations)

    monkeypatch.setattr(module, "call_reward_function", dies)
    return seen


@pytest.mark.parametrize(("cut", "left"), [(0, 3), (7, 4), (None, 6)])
def test_a_killed_run_gives_the_same_bytes(samples, functions, tmp_path, monkeypatch, cut, left):
    whole, out, part = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.part"))
    both = scorers(functions, "thirds", "words=2")
    score_file(samples, str(whole), both, batch_size=4)  # three batches of each
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        score_file(samples, str(out), both, batch_size=4)
    assert not out.exists()
    lines = part.read_bytes()
    part.write_bytes(lines[:9] if cut is None else lines[: len(lines) - cut])
    seen = stop_after(monkeypatch, None)
    score_file(samples, str(out), both, batch_size=4)
    assert len(seen) == left
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_a_changed_function_is_noticed(samples, functions, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        score_file(samples, str(out), scorers(functions, "words"), batch_size=4)
    (tmp_path / "rewards.py").write_text(FUNCTIONS.replace(".split()", ""))
    stop_after(monkeypatch, None)
    with pytest.raises(UserError, match="out.jsonl.part is of a run with another scorers"):
        score_file(samples, str(out), scorers(functions, "words"), batch_size=4)
    score_file(samples, str(out), scorers(functions, "words"), batch_size=4, overwrite=True)
    assert read(out)[0]["scores"] == [1, 3, 1]
    with pytest.raises(UserError, match="exists already"):
        score_file(samples, str(out), scorers(functions, "words"))
    assert read(out)[0]["scores"] == [1, 3, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"samples.jsonl, line .*rewards.py:too_few returned 8 scores for 9 responses"),
        ("not_a_number", r"samples.jsonl, line 2, response 1: .*rewards.py:not_a_number returned nan; return a finite"),
        ("text", r"response 1: .*rewards.py:text returned 'good'"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_functions_that_return_no_scores_are_named(samples, functions, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        score_file(samples, str(tmp_path / "out.jsonl"), scorers(functions, name))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "got an unexpected keyword argument 'prompts'"),
        (lambda prompts, completions, solution: [1.0], "missing a required argument: 'solution'"),
    ],
)
def test_functions_that_cannot_be_called_so_are_named(function, message):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["x"]}]
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: mine {message}"):
        call_reward_function(function, "mine", rows, ["rows.jsonl, line 1"])


def load(tmp_path, text, name="reward", file="mine.py"):
    (tmp_path / file).write_text(text)
    return load_reward_function(f"{tmp_path / file}:{name}")


ANNOTATED = """
from __future__ import annotations
from dataclasses import dataclass, field
from json import dumps
from beside import count


@dataclass
class Rule:
    word: str
    kinds: list[Rule] = field(default_factory=list)


def reward(prompts, completions, **columns):
    import later
    return [float(later.twice(count(c[0]["content"]))) for c in completions]
"""


def test_a_file_is_a_module_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("def count(text):\n    return len(text.split())\n")
    (tmp_path / "later.py").write_text("def twice(number):\n    return 2 * number\n")
    path = [*sys.path]
    function = load(tmp_path, ANNOTATED, file="json.py")
    assert sys.modules["json"] is json, "a file's name hides no module"
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["x y", "z"]}]
    scorer = Scorer.parse(f"{tmp_path}/mine.py:reward", is_model=False)
    before = scorer.fingerprint()
    assert call_reward_function(function, "mine", rows, ["line 1"]) == [[4.0, 2.0]]
    (tmp_path / "unrelated.py").touch()
    assert scorer.fingerprint() != before, "another file is imported"
    before = scorer.fingerprint()
    (tmp_path / "later.py").write_text("")
    assert scorer.fingerprint() != before, "one of them has changed"
    assert sys.path == [*path, str(tmp_path)], "its folder comes last when it is loaded"


def test_each_file_imports_its_own_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["x"]}]
    scores = []
    for value in (1, 2, 1):
        folder = tmp_path / str(value)
        folder.mkdir(exist_ok=True)
        (folder / "namesake.py").write_text(f"VALUE = {value}\n")
        text = "from namesake import VALUE\ndef reward(prompts, completions): return [VALUE]\n"
        scores += call_reward_function(load(folder, text), "mine", rows, ["line 1"])
    assert scores == [[1.0], [2.0], [1.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nowhere_at_all",
            r"mine.py cannot be loaded: ModuleNotFoundError: .*nowhere_at_all.* .mine.py, line 1",
        ),
        ("a = 1\nb = a +", r"mine.py cannot be loaded: SyntaxError: .* .mine.py, line 2."),
        ("a = 1\n\nb = {}[a]", r"mine.py cannot be loaded: KeyError: 1 .mine.py, line 3."),
        ("import sys\nsys.exit(3)", r"mine.py cannot be loaded: SystemExit: 3 .mine.py, line 2."),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield 1.0", r"line 1 and 1 rows more: mine returned 1 scores for 3 responses"),
        ("while True:\n        yield 1.0", r"mine returned 4 scores for 3 responses"),
        ("return 0.5", r"mine returned 0.5 and no list of scores; it must return one for each completion"),
        ("return '111'", r"mine returned '111' and no list of scores"),
        ("pass", r"mine returned None and no list of scores"),
        ("return [1 / (c[0]['content'] != 'z') for c in completions]",
         r"^line 2: mine fails: ZeroDivisionError: division by zero .mine.py, line 2.; return None where"),
        ("return [len(completions) - 3 or 1 / 0] * 3", r"^line 1 and 1 rows more: mine fails: ZeroDivisionError"),
        ("yield 1.0\n    raise KeyError('gold')", r"^line 1: mine fails: KeyError: 'gold' .mine.py, line 3."),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_named_with_its_row(tmp_path, body, message):
    function = load(tmp_path, f"def reward(prompts, completions):\n    {body}\n")
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": texts} for texts in (["x", "y"], ["z"])]
    with pytest.raises(UserError, match=message):
        call_reward_function(function, "mine", rows, ["line 1", "line 2"])


def test_generators_and_arrays_are_lists_too(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["x", "y"]}]
    for values in ("iter([1, 2.5])", "np.array([1, 2.5])", "torch.tensor([1, 2.5])", "(1, 2.5)"):
        function = load(tmp_path, f"import numpy as np, torch\ndef reward(prompts, completions): return {values}\n")
        assert call_reward_function(function, "mine", rows, ["line 1"]) == [[1.0, 2.5]]


def test_the_script(samples, functions, reward_model, tmp_path, monkeypatch, capsys):
    flags = ["--reward_function", f"{functions}:words=2", f"{functions}:thirds", "--reward_model", reward_model]
    assert script(monkeypatch, "score.py", samples, *flags, "--output", tmp_path / "out.jsonl", "--digits=3") == 0
    assert "4 rows, 9 responses scored" in capsys.readouterr().out
    row = read(tmp_path / "out.jsonl")[0]
    assert list(row["score_parts"]) == [f"{functions}:words", f"{functions}:thirds", reward_model]
    assert row["score_parts"][f"{functions}:thirds"] == [0.333, 1.0, 0.333]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a --reward_function or a --reward_model"),
        (["--reward_function", "rewards.py:words", "rewards.py:words=2"], "rewards.py:words is given twice"),
        (["--reward_function", "rewards.py:words=much"], "'rewards.py:words=much' is no NAME=WEIGHT"),
        (["--reward_function", "nowhere.py:words"], "names no file"),
        (["--reward_function", "rewards.py:words", "--batch_size=0"], "--batch_size of at least 1"),
        (["--reward_model", "models/nowhere"], "models/nowhere cannot be loaded"),
        (["--reward_function", "rewards.py:words", "--output=out.csv"], "name a .jsonl file"),
    ],
)
def test_mistakes_are_one_line(samples, functions, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "score.py", samples, "--output=out.jsonl", *flags) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_rows_without_responses_are_named(functions, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "p", "responses": ["a"]}, {"prompt": "p"}])
    with pytest.raises(UserError, match="prompts.jsonl, line 2: needs a column responses"):
        score_file(path, str(tmp_path / "out.jsonl"), scorers(functions, "words"))
