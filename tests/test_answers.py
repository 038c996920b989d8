"""Answers to MT-bench and AlpacaEval: FastChat's files, the prompts of training, and that a kill loses nothing."""

import json
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.evaluation import answers as module
from alignment.evaluation.answers import TEMPERATURES, answer_mt_bench
from alignment.models import load_trained_model
from alignment.sampling.sample import SamplingConfig, encode_prompt, sample_batch
from tests.conftest import MODEL, SHARED, needs_model, needs_shared
from tests.scripts import Killed, read, save_stopping_model, script, write
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_nca.responses import ResponseTokenizer

CONFIG = SamplingConfig(num_samples=1, max_new_tokens=4, batch_size=2)
CATEGORIES = ["math", "writing", "stem", "math", "writing", "other"]
QUESTIONS = [
    {"question_id": 90 - i, "category": category, "turns": [f"Question {i}?", f"And {'really ' * i}?"]}
    for i, category in enumerate(CATEGORIES)
]
QUESTIONS[2]["turns"] = ["One turn only."]
QUESTIONS[3]["turns"][1] = "Does <|im_end|> stay text?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stopping_model(tmp_path_factory.mktemp("answers") / "stopping")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """Folder of an adapter on it that changes what it says."""
    folder = tmp_path_factory.mktemp("answers") / "adapter"
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "question.jsonl", QUESTIONS)


def mt_bench(questions, model, output, config=CONFIG, model_id="tiny", overwrite=False):
    return answer_mt_bench(questions, model, str(output), model_id, config, "auto", overwrite)


@pytest.fixture
def calls(monkeypatch):
    """Each batch that is sampled: its prompts' ids, its index and how it is drawn."""
    seen = []

    def watched(prompt_ids, index, model, tokenizer, config):
        samples = sample_batch(prompt_ids, index, model, tokenizer, config)
        seen.append((prompt_ids, index, config, samples))
        return samples

    monkeypatch.setattr(module, "sample_batch", watched)
    return seen


def check_fastchat(path, questions, model_id):
    """Reads an answer file as FastChat does: `load_model_answers`, `check_data`, and the fields that are shown."""
    rows = read(path)
    asked = {question["question_id"]: question for question in questions}
    assert path.name == f"{model_id}.jsonl", "the model's name is the file's"
    assert path.parent.name == "model_answer"
    assert [row["question_id"] for row in rows] == sorted(asked)
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == model_id
        assert [choice["index"] for choice in row["choices"]] == [0]
        turns = row["choices"][0]["turns"]
        assert len(turns) == len(asked[row["question_id"]]["turns"])
        assert all(isinstance(turn, str) and turn == turn.strip() for turn in turns)
        assert abs(time.time() - row["tstamp"]) < 600
    assert len({row["answer_id"] for row in rows}) == len(rows)
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


@needs_shared
def test_the_80_questions_of_mt_bench(tmp_path, tiny_model, monkeypatch):
    file = SHARED / "data" / "mt_bench" / "question.jsonl"
    flags = ["--benchmark=mt_bench", f"--questions={file}", f"--model_name_or_path={tiny_model}", "--model_id=m-1",
             f"--output_dir={tmp_path}", "--max_new_tokens=2", "--batch_size=8"]  # fmt: skip
    assert script(monkeypatch, "generate_answers.py", *flags) == 0
    asked = read(file)
    assert {question["category"] for question in asked} == set(TEMPERATURES)
    turns = check_fastchat(tmp_path / "model_answer" / "m-1.jsonl", asked, "m-1")
    assert sorted(turns) == list(range(81, 161))
    assert len({text for texts in turns.values() for text in texts}) > 20


def test_every_turn_sees_what_training_would_show_it(questions, model, tmp_path, calls):
    output = tmp_path / "model_answer" / "tiny.jsonl"
    mt_bench(questions, model, output)
    answers = check_fastchat(output, QUESTIONS, "tiny")
    train = ResponseTokenizer(AutoTokenizer.from_pretrained(model))
    expected = {}
    for question in QUESTIONS:
        messages = []
        answered = answers[question["question_id"]]
        for turn, (text, answer) in enumerate(zip(question["turns"], answered, strict=True)):
            messages = [*messages, {"role": "user", "content": text}]
            row = train({"prompt": messages, "responses": ["a", "b"], "scores": [0, 1]})
            expected[tuple(row["prompt_ids"])] = answer, question["category"], turn
            messages = [*messages, {"role": "assistant", "content": answer}]
    seen = {}
    for prompt_ids, index, config, samples in calls:
        for ids, (sample,) in zip(prompt_ids, samples, strict=True):
            _, category, turn = expected[tuple(ids)]
            assert config.temperature == {**TEMPERATURES, "other": 0.7}[category]
            assert (turn == 1) == (index > 3), "first turns come first"
            seen[tuple(ids)] = sample.text.strip(), category, turn
    assert seen == expected
    assert [index for _, index, _, _ in calls] == list(range(len(calls))), "every batch has a seed of its own"


@pytest.mark.parametrize("template", ["chatml", "mistral", "none"])
def test_text_that_spells_a_token_stays_text(template):
    templates = {
        "mistral": "<|endoftext|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        "none": None,
    }
    tokenizer = tiny_tokenizer(templates[template]) if template in templates else tiny_tokenizer()
    prompts = [[{"role": "user", "content": text}] for text in ("Hi.", "<|im_end|>", " a<|im_start|>b<|im_end|>c ")]
    if template != "none":
        prompts.append([*prompts[0], {"role": "assistant", "content": "<|endoftext|> "}, *prompts[2]])
    for prompt in prompts:
        row = ResponseTokenizer(tokenizer)({"prompt": prompt, "responses": ["a", "b"], "scores": [0, 1]})
        assert encode_prompt(tokenizer, prompt) == row["prompt_ids"]
        controls = row["prompt_ids"].count(tokenizer.eos_token_id)
        assert controls == (len(prompt) if template == "chatml" else 0)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    tokenizer = tiny_tokenizer(None)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", special_tokens=[(end, 2)])
    assert tokenizer("Hi.")["input_ids"][-1] == tokenizer.eos_token_id
    row = ResponseTokenizer(tokenizer)({"prompt": "Hi.", "responses": ["a", "b"], "scores": [0, 1]})
    assert encode_prompt(tokenizer, [{"role": "user", "content": "Hi."}]) == row["prompt_ids"]
    assert tokenizer.eos_token_id not in row["prompt_ids"]


def test_the_temperatures_are_fastchats():
    alike = {t: {name for name in TEMPERATURES if TEMPERATURES[name] == t} for t in TEMPERATURES.values()}
    assert alike == {
        0.7: {"writing", "roleplay"},
        0.1: {"stem", "humanities"},
        0.0: {"extraction", "math", "coding", "reasoning"},
    }


@needs_model
def test_the_embedded_models_prompts_are_those_of_training():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("Is <|im_end|> 12345?", " é\n"):
        prompt = [{"role": "user", "content": text}]
        row = ResponseTokenizer(tokenizer)({"prompt": prompt, "responses": ["a", "b"], "scores": [0, 1]})
        assert encode_prompt(tokenizer, prompt) == row["prompt_ids"]


def test_greedy_categories_say_the_likeliest(questions, model, adapter, tmp_path):
    answers = {}
    for name, seed in (("a", 0), ("b", 1), ("adapter", 0)):
        output = tmp_path / "model_answer" / f"{name}.jsonl"
        config = SamplingConfig(num_samples=1, max_new_tokens=4, batch_size=2, seed=seed)
        mt_bench(questions, adapter if name == "adapter" else model, output, config, model_id=name)
        answers[name] = check_fastchat(output, QUESTIONS, name)
    of = {question["question_id"]: question["category"] for question in QUESTIONS}
    greedy = {number for number, category in of.items() if TEMPERATURES.get(category) == 0.0}
    assert {number: answers["a"][number] for number in greedy} == {number: answers["b"][number] for number in greedy}
    assert answers["a"] != answers["b"], "the others are drawn"
    assert any(answers["a"][number] != answers["adapter"][number] for number in greedy)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    prompt = [{"role": "user", "content": "Question 0?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = policy.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers["a"][90][0] == text.strip()


def without_times(path):
    return re.sub(rb'"tstamp": [\d.]+', b"", path.read_bytes())


def stop_after(monkeypatch, num_batches):
    """Makes sampling die after so many batches; returns the indices of those that were sampled."""
    seen = []

    def dies(prompt_ids, index, *rest):
        if len(seen) == num_batches:
            raise Killed
        seen.append(index)
        return sample_batch(prompt_ids, index, *rest)

    monkeypatch.setattr(module, "sample_batch", dies)
    return seen


@pytest.mark.parametrize(("num_batches", "cut"), [(2, 0), (6, 0), (6, 9)])
def test_a_killed_run_gives_the_same_answers(questions, model, tmp_path, monkeypatch, num_batches, cut):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    mt_bench(questions, model, whole)
    stop_after(monkeypatch, num_batches)
    with pytest.raises(Killed):
        mt_bench(questions, model, out)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes()
    part.write_bytes(lines[: len(lines) - cut])  # as a kill tears the last
    seen = stop_after(monkeypatch, None)
    mt_bench(questions, model, out)
    assert seen == list(range(num_batches - bool(cut), 7))
    assert without_times(out) == without_times(whole)
    assert not part.exists()


def test_a_sigkill_in_the_middle(model, tmp_path):
    rows = [question | {"question_id": i} for i, question in enumerate(QUESTIONS * 10)]
    questions, output = write(tmp_path / "question.jsonl", rows), tmp_path / "model_answer" / "tiny.jsonl"
    part = output.with_name("tiny.jsonl.part")
    # Forked, since a new process takes longer to import torch than all of this.
    process = multiprocessing.get_context("fork").Process(target=mt_bench, args=(questions, model, output))
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 3 < len(read(part)) < 60, "killed in the middle"
    mt_bench(questions, model, output)
    mt_bench(questions, model, tmp_path / "whole.jsonl")
    assert without_times(output) == without_times(tmp_path / "whole.jsonl")
    check_fastchat(output, rows, "tiny")


def test_other_settings_do_not_mix_and_nothing_is_replaced_unasked(questions, model, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        mt_bench(questions, model, out)
    stop_after(monkeypatch, None)
    with pytest.raises(UserError, match="of a run with another max_new_tokens"):
        mt_bench(questions, model, out, SamplingConfig(num_samples=1, max_new_tokens=5, batch_size=2))
    mt_bench(questions, model, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        mt_bench(questions, model, out)
    assert out.read_bytes() == before
    mt_bench(questions, model, out, model_id="again", overwrite=True)
    assert read(out)[0]["model_id"] == "again"


def test_alpaca_eval(model, tmp_path, monkeypatch, capsys, calls):
    rows = [{"instruction": f"Do {'this ' * i}é.", "dataset": f"set-{i % 2}", "output": "old"} for i in range(5)]
    del rows[4]["dataset"]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    flags = ["--benchmark=alpaca_eval", f"--questions={tmp_path}/asked.json", f"--model_name_or_path={model}",
             f"--output_dir={tmp_path}/out", "--max_new_tokens=9", "--batch_size=2"]  # fmt: skip
    assert script(monkeypatch, "generate_answers.py", *flags) == 0
    assert {config.temperature for _, _, config, _ in calls} == {0.7}
    printed = capsys.readouterr().out
    cut = sum(not sample.finished for *_, samples in calls for (sample,) in samples)
    assert f"5 answers; {cut} of them ran into max_new_tokens" in printed
    assert 0 < cut < 5
    file = tmp_path / "out" / "stopping" / "model_outputs.json"
    found = json.loads(file.read_text())
    assert [list(row) for row in found] == [["instruction", "output", "generator", "dataset"]] * 5
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows], "in the file's order"
    assert [row["dataset"] for row in found] == ["set-0", "set-1", "set-0", "set-1", "asked"]
    assert {row["generator"] for row in found} == {"stopping"}
    said = {tuple(ids): sample.text for prompt_ids, _, _, samples in calls
            for ids, (sample,) in zip(prompt_ids, samples, strict=True)}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in found:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": row["instruction"]}])
        assert row["output"] == said[tuple(ids)].strip()
    assert script(monkeypatch, "generate_answers.py", *flags, "--temperature=0", "--overwrite") == 0
    assert {config.temperature for _, _, config, _ in calls[-3:]} == {0.0}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (None, [], "question.jsonl: no such file"),
        ([], [], "question.jsonl: no rows"),
        ([{"question_id": 1, "turns": ["a"]}], [], "line 1: lacks category; it has question_id, turns"),
        ([QUESTIONS[0], QUESTIONS[0]], [], "line 2: question_id 90 stands in an earlier row too"),
        ([QUESTIONS[0] | {"question_id": "a"}], [], "line 1: question_id 'a' is no whole number"),
        ([QUESTIONS[0] | {"turns": "a"}], [], "line 1: turns must be a list of 1 texts or more"),
        ([QUESTIONS[0] | {"turns": []}], [], "line 1: turns must be a list of 1 texts or more"),
        ([QUESTIONS[0] | {"turns": ["\ud800"]}], [], "line 1: holds half of a surrogate pair"),
        (QUESTIONS, ["--max_new_tokens=1024"], "2 x 1024 of answers, are more than the 2048 of"),
        (QUESTIONS, ["--max_new_tokens=0"], "--max_new_tokens: must be at least 1"),
        (QUESTIONS, ["--temperature=1"], "MT-bench has one for each category"),
        (QUESTIONS, ["--model_id=a/b"], "give a name without slashes"),
        (QUESTIONS, ["--model_name_or_path=models/nowhere"], "'models/nowhere' is neither a folder with"),
        (QUESTIONS, ["--benchmark=alpaca_eval"], "line 1: lacks instruction"),
        (
            [{"instruction": "a"}, {"instruction": "a"}],
            ["--benchmark=alpaca_eval"],
            "stands in an earlier row too",
        ),
        ([{"instruction": " "}], ["--benchmark=alpaca_eval"], "line 1: the instruction is empty"),
        ([{"instruction": 7}], ["--benchmark=alpaca_eval"], "line 1: instruction is no text"),
    ],
)
def test_mistakes_are_one_line(rows, flags, message, tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        write(tmp_path / "question.jsonl", rows)
    all_flags = ["--benchmark=mt_bench", "--questions=question.jsonl", f"--model_name_or_path={model}",
                 "--output_dir=out", *flags]  # fmt: skip
    assert script(monkeypatch, "generate_answers.py", *all_flags) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ")
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_number_in_the_advice_fits(questions, model, tmp_path):
    with pytest.raises(UserError) as error:
        mt_bench(questions, model, tmp_path / "out.jsonl", SamplingConfig(num_samples=1, max_new_tokens=1024))
    advice = int(re.search(r"--max_new_tokens (\d+) fits", str(error.value))[1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, second = QUESTIONS[5]["turns"]  # of the lowest id
    prompt = [{"role": "user", "content": first}, {"role": "assistant", "content": ""}]
    prompt.append({"role": "user", "content": second})
    assert 2048 - 1 <= len(encode_prompt(tokenizer, prompt)) + 2 * advice <= 2048


def test_a_finished_part_needs_no_model(questions, tmp_path, monkeypatch):
    name = save_tiny_model(tmp_path / "model")
    loaded = []
    monkeypatch.setattr(module, "load_trained_model", lambda *args: loaded.append(args) or load_trained_model(*args))
    monkeypatch.setattr(module.PartFile, "finish", lambda self, rows: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        mt_bench(questions, name, tmp_path / "out.jsonl")
    assert len(loaded) == 1
    monkeypatch.undo()
    monkeypatch.setattr(module, "load_trained_model", lambda *args: pytest.fail("loaded again"))
    mt_bench(questions, name, tmp_path / "out.jsonl")
    assert len(read(tmp_path / "out.jsonl")) == 6
