"""Prompts in, responses out: what a file of samples holds, and that a killed run gives the same bytes."""

import json
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.resumable import PartFile
from alignment.sampling import sample_file as module
from alignment.sampling.prompts import read_prompts
from alignment.sampling.sample import SamplingConfig, encode_prompt, encode_row, sample_batch, sample_responses
from alignment.sampling.sample_file import choose_engine, sample_file, vllm_sampler
from tests.conftest import ROOT
from tests.forked import run_as_main, start
from tests.scripts import Killed, read, save_stopping_model, script, write
from tests.templates import QWEN3, TOOLS, TRAJECTORIES, user
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_nca.responses import ResponseTokenizer

CONFIG = SamplingConfig(num_samples=2, max_new_tokens=6, batch_size=4)
PROMPTS = [f"What is {'the capital of ' * n}France?" for n in (1, 4, 0, 2, 3, 6, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stopping_model(tmp_path_factory.mktemp("sample") / "stopping")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """Folder of an adapter on it that changes what it says; it has no tokenizer of its own."""
    folder = tmp_path_factory.mktemp("sample") / "adapter"
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(folder)
    return str(folder)


def write_prompts(folder):
    rows = [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)]
    rows[1]["prompt"] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPTS[1]}]
    rows[2] |= {"responses": ["old"], "sources": ["old"], "scores": [1.0], "score_parts": {"f": [1.0]}}
    return write(folder / "prompts.jsonl", rows)


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts: texts, messages, and a row that was sampled and scored before."""
    return write_prompts(tmp_path)


@pytest.fixture(scope="module")
def whole(model, adapter, tmp_path_factory):
    """What the model and the adapter say to them in turns."""
    folder = tmp_path_factory.mktemp("whole")
    sample_file(write_prompts(folder), [model, adapter], str(folder / "whole.jsonl"), CONFIG)
    return folder / "whole.jsonl"


def test_rows_are_the_prompts_with_their_samples(prompts, model, tmp_path):
    sample_file(prompts, [model], str(tmp_path / "out.jsonl"), CONFIG)
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    assert rows[0]["prompt"] == [{"role": "user", "content": PROMPTS[0]}]
    assert rows[1]["prompt"][0] == {"role": "system", "content": "Be short."}
    assert all(list(row) == ["prompt", "responses", "sources", "id"] for row in rows)
    assert all(row["sources"] == [model] * 2 for row in rows)
    drawn = sample_responses(
        AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model),
        rows, num_samples=2, max_new_tokens=6, batch_size=4,
    )  # fmt: skip
    assert [row["responses"] for row in rows] == [[one.text.strip() for one in of_prompt] for of_prompt in drawn]
    assert len({text for row in rows for text in row["responses"]}) > len(PROMPTS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.jsonl"]


def test_every_batch_stands_for_itself(model):
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": PROMPTS[0]}])]
    first, second, again = (sample_batch(ids, index, policy, tokenizer, CONFIG) for index in (0, 1, 0))
    assert first == again != second
    moved = SamplingConfig(num_samples=2, max_new_tokens=6, batch_size=4, seed=1)
    assert sample_batch(ids, 0, policy, tokenizer, moved) == second


def test_a_prompt_of_one_token_without_a_template(model):
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, [{"role": "user", "content": "a"}]) == tokenizer("a")["input_ids"]
    greedy = SamplingConfig(num_samples=2, max_new_tokens=5, temperature=0)
    ((one, two),) = sample_batch([tokenizer("a")["input_ids"]], 0, policy, tokenizer, greedy)
    plain = policy.generate(torch.tensor([tokenizer("a")["input_ids"]]), max_new_tokens=5, do_sample=False)
    assert one == two
    assert one.text == tokenizer.decode(plain[0, 1:], skip_special_tokens=True)


def test_models_and_adapters_take_turns(prompts, model, adapter, tmp_path):
    sample_file(prompts, [model, adapter, model], str(tmp_path / "out.jsonl"), CONFIG)
    rows = read(tmp_path / "out.jsonl")
    assert all(row["sources"] == [model] * 2 + [adapter] * 2 + [model] * 2 for row in rows)
    sample_file(prompts, [model], str(tmp_path / "one.jsonl"), CONFIG)
    assert [row["responses"][:2] for row in rows] == [row["responses"] for row in read(tmp_path / "one.jsonl")]
    assert [row["responses"][:2] for row in rows] != [row["responses"][4:] for row in rows], "new seeds"
    greedy = SamplingConfig(num_samples=1, max_new_tokens=6, temperature=0)
    sample_file(prompts, [model, adapter], str(tmp_path / "greedy.jsonl"), greedy)
    plain, adapted = zip(*(row["responses"] for row in read(tmp_path / "greedy.jsonl")), strict=True)
    assert plain != adapted


def test_finished_only_leaves_out_what_ran_into_the_limit(prompts, model, tmp_path):
    greedy = {"num_samples": 1, "temperature": 0.0}
    names = {"some": (6, True), "all": (6, False), "longer": (12, False)}
    for name, (limit, finished_only) in names.items():
        config = SamplingConfig(max_new_tokens=limit, **greedy)
        said = sample_file(prompts, [model], str(tmp_path / f"{name}.jsonl"), config, finished_only=finished_only)
        names[name] = [row["responses"] for row in read(tmp_path / f"{name}.jsonl")]
        if name == "some":
            cut = sum(not texts for texts in names[name])
            assert f"{cut} of them ran into max_new_tokens and were left out" in said
    assert 0 < cut < len(PROMPTS)
    for some, whole, longer in zip(names["some"], names["all"], names["longer"], strict=True):
        assert some == (whole if whole == longer else [])


def stop_after(monkeypatch, num_batches):
    """Makes sampling die after so many batches; returns the indices of the batches that were sampled."""
    seen = []

    def dies(prompt_ids, index, **rest):
        if len(seen) == num_batches:
            raise Killed
        seen.append(index)
        return sample_batch(prompt_ids, index, **rest)

    monkeypatch.setattr(module, "sample_batch", dies)
    return seen


@pytest.mark.parametrize(("cut", "left"), [(0, 3), (5, 2), ("middle", 1), ("header", 0)])
def test_a_killed_run_gives_the_same_bytes(prompts, model, adapter, whole, tmp_path, monkeypatch, cut, left):
    out, part, models = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part", [model, adapter]
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        sample_file(prompts, models, str(out), CONFIG)
    assert not out.exists()
    lines = part.read_bytes()
    if cut == "header":
        part.write_bytes(lines[:20])
    elif cut == "middle":  # as a power cut leaves blocks that were not written
        part.write_bytes(lines.replace(b'"batch": 1', b"\0" * 10))
    else:
        part.write_bytes(lines[: len(lines) - cut])
    seen = stop_after(monkeypatch, None)
    sample_file(prompts, models, str(out), CONFIG)
    assert seen == list(range(left, 8)), "batches that stand in the file are not sampled again"
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_what_was_torn_is_gone_after_the_next_batch(tmp_path):
    out, part = str(tmp_path / "out.jsonl"), tmp_path / "out.jsonl.part"
    PartFile(out, {"seed": 1}).add({"batch": 0})
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"batch": 1, "rows": [' + b"7, " * 99)
    resumed = PartFile(out, {"seed": 1})
    assert resumed.entries == [{"batch": 0}]
    resumed.add({"batch": 1})
    assert part.read_bytes() == whole + b'{"batch": 1}\n'


def test_a_sigkill_in_the_middle(model, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{text} {i}"} for i in range(12) for text in PROMPTS])
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [f"{ROOT}/alignment-handbook/scripts/sample.py", prompts, "--model_name_or_path", model,
               "--output", str(out), "--num_samples=2", "--max_new_tokens=6", "--batch_size=4"]  # fmt: skip
    process = start(run_as_main, command)
    while process.is_alive() and not (part.exists() and part.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    sample_file(prompts, [model], str(out), CONFIG)
    sample_file(prompts, [model], str(tmp_path / "whole.jsonl"), CONFIG)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(read(out)) == 84


def test_other_settings_do_not_mix(prompts, model, tmp_path, monkeypatch):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    stop_after(monkeypatch, 2)
    with pytest.raises(Killed):
        sample_file(prompts, [model], str(out), CONFIG)
    before = part.read_bytes()
    other = SamplingConfig(num_samples=2, max_new_tokens=6, batch_size=4, temperature=0.5)
    stop_after(monkeypatch, None)
    with pytest.raises(UserError, match="out.jsonl.part is of a run with another temperature; remove it"):
        sample_file(prompts, [model], str(out), other)
    changed = write(tmp_path / "changed.jsonl", [{"prompt": "changed"}])
    with pytest.raises(UserError, match="another prompts"):
        sample_file(changed, [model], str(out), CONFIG)
    assert part.read_bytes() == before
    sample_file(prompts, [model], str(out), other, overwrite=True)
    sample_file(prompts, [model], str(tmp_path / "other.jsonl"), other)
    assert out.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_another_model_under_the_same_name_is_noticed(prompts, tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    stop_after(monkeypatch, 2)
    with pytest.raises(Killed):
        sample_file(prompts, [model], str(tmp_path / "out.jsonl"), CONFIG)
    save_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match="another models"):
        sample_file(prompts, [model], str(tmp_path / "out.jsonl"), CONFIG)


def test_a_file_that_is_there_is_not_replaced_unasked(prompts, model, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(UserError, match="exists already; name another file, or give --overwrite"):
        sample_file(prompts, [model], str(out), CONFIG)
    assert out.read_text() == "precious\n"
    sample_file(prompts, [model], str(out), CONFIG, overwrite=True)
    assert len(read(out)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "no rows"),
        ('{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
        ('{"instruction": "a"}\n', "line 1: needs a column prompt; found instruction"),
        ('{"prompt": 3}\n', "line 1: the prompt is neither text nor messages"),
        ('{"prompt": [{"role": "user"}]}\n', "line 1: the prompt is neither text nor messages"),
        ('{"prompt": " "}\n', "line 1: the prompt must end with a user's turn that says something"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', "line 1: the prompt must end with a user's turn"),
        ('{"prompt": "\\ud800"}\n', "line 1: holds half of a surrogate pair"),
        ('{"prompt": "' + "a b " * 2000 + '"}\n', "line 1: the prompt has .* tokens, and with --max_new_tokens 6 more"),
    ],
)
def test_bad_prompts_are_named(tmp_path, model, text, message):
    if text is not None:
        (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        sample_file(str(tmp_path / "bad.jsonl"), [model], str(tmp_path / "out.jsonl"), CONFIG)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_template_that_refuses_names_the_row(prompts, tmp_path):
    folder = tmp_path / "model"
    save_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2: the chat template of .* refuses .* no system turns"):
        sample_file(prompts, [str(folder)], str(tmp_path / "out.jsonl"), CONFIG)


def test_tools_reach_the_template_and_the_output(tmp_path):
    save_tiny_model(tmp_path / "model")
    tiny_tokenizer(QWEN3).save_pretrained(tmp_path / "model")
    turns, quick = TRAJECTORIES["call"], {"enable_thinking": False}
    rows = [
        {"prompt": [user("17 * 23?")], "tools": TOOLS, "chat_template_kwargs": quick},
        {"prompt": [user("17 * 23?"), *turns[:2]], "tools": json.dumps(TOOLS)},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample_file(str(tmp_path / "rows.jsonl"), [str(tmp_path / "model")], str(tmp_path / "out.jsonl"), CONFIG)
    written, tokenizer = read(tmp_path / "out.jsonl"), tiny_tokenizer(QWEN3)
    assert [row["tools"] for row in written] == [TOOLS, TOOLS]
    assert written[0]["chat_template_kwargs"] == quick
    assert written[1]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"expression": "17 * 23"}
    ends = ("assistant\n<think>\n\n</think>\n\n", "</tool_response><|im_end|>\n<|im_start|>assistant\n")
    for row, end in zip(written, ends, strict=True):
        ids = encode_row(tokenizer, row)
        assert tokenizer.decode(ids).endswith(end)
        trained = ResponseTokenizer(tokenizer)(row | {"responses": ["a", "b"], "scores": [0, 1]})
        assert trained["prompt_ids"] == ids


def test_lines_of_text_are_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("First\u2028still first\n\n  Second \n", encoding="utf-8")
    rows, locations = read_prompts(str(tmp_path / "prompts.txt"))
    assert [row["prompt"][0]["content"] for row in rows] == ["First\u2028still first", "Second"]
    assert locations[1].endswith("prompts.txt, line 3")


def test_the_script(prompts, model, tmp_path, monkeypatch, capsys):
    flags = ["--model_name_or_path", model, "--num_samples=2", "--max_new_tokens=6", "--engine=transformers"]
    assert script(monkeypatch, "sample.py", prompts, *flags, "--output", tmp_path / "out.jsonl", "--batch_size=4") == 0
    assert "7 prompts, 14 responses" in capsys.readouterr().out
    sample_file(prompts, [model], str(tmp_path / "same.jsonl"), CONFIG)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output=out.jsonl", "--num_sample=3"], "unknown flag --num_sample; did you mean --num_samples?"),
        (["--output=out.txt"], "name a .jsonl file"),
        (["--output=out.jsonl", "--num_samples=0"], "--num_samples: must be at least 1, got 0"),
        (["--output=out.jsonl", "--temperature=-1"], "--temperature must be at least 0"),
        (["--output=out.jsonl", "--engine=vllm"], "vllm is not installed"),
        (["--output=out.jsonl", "--model_name_or_path", "models/nowhere"], "'models/nowhere' is neither a folder with"),
    ],
)
def test_mistakes_are_one_line(prompts, model, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "sample.py", prompts, "--model_name_or_path", model, *flags) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ")
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM, as strict as it is: the requests it was given, and texts that name their seed."""
    calls = SimpleNamespace(llm=None, requests=[])

    class LLM:
        def __init__(self, model, tokenizer, dtype, enable_lora=False, max_lora_rank=16):
            calls.llm = (model, tokenizer, dtype, enable_lora, max_lora_rank)

        def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
            assert len(prompts) == len(sampling_params)
            calls.requests += zip(prompts, sampling_params, [lora_request] * len(prompts), strict=True)
            return [
                SimpleNamespace(outputs=[
                    SimpleNamespace(text=f" {params.seed} {k} ", finish_reason="length" if k == 1 else "stop")
                    for k in range(params.n)
                ])
                for params in sampling_params
            ]  # fmt: skip

    class SamplingParams:
        def __init__(self, n=1, temperature=1.0, top_p=1.0, max_tokens=16, stop_token_ids=None, seed=None):
            assert n == 1 or temperature > 0, "n must be 1 when using greedy sampling"
            self.n, self.seed = n, seed
            self.rest = (temperature, top_p, max_tokens, stop_token_ids)

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm"].__spec__ = ModuleSpec("vllm", None)
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SamplingParams
    modules["vllm.lora.request"].LoRARequest = lambda *fields: fields
    for name, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    return calls


def test_vllm_is_used_where_it_is_installed(vllm, prompts, model, tmp_path):
    assert choose_engine("auto") == choose_engine("vllm") == "vllm"
    assert choose_engine("transformers") == "transformers"
    config = SamplingConfig(num_samples=3, max_new_tokens=6, temperature=0.7, top_p=0.9, batch_size=6)
    sample_file(prompts, [model], str(tmp_path / "out.jsonl"), config, engine="vllm", finished_only=True)
    assert vllm.llm == (model, model, "auto", False, 16)
    rows = read(tmp_path / "out.jsonl")
    assert len({params.seed for _, params, _ in vllm.requests}) == len(PROMPTS), "every prompt has its own seed"
    assert {(*params.rest[:3], *params.rest[3], lora) for _, params, lora in vllm.requests} == {(0.7, 0.9, 6, 2, None)}
    tokenizer = AutoTokenizer.from_pretrained(model)
    seeds = {tuple(prompt["prompt_token_ids"]): params.seed for prompt, params, _ in vllm.requests}
    for row in rows:
        seed = seeds[tuple(encode_prompt(tokenizer, row["prompt"]))]
        assert row["responses"] == [f"{seed} 0", f"{seed} 2"], "the second of each ran into the limit"
    sample_file(prompts, [model], str(tmp_path / "again.jsonl"), config, engine="vllm", finished_only=True)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_vllm_with_an_adapter_and_without_chance(vllm, prompts, model, adapter, tmp_path):
    greedy = SamplingConfig(num_samples=3, max_new_tokens=6, temperature=0)
    sample_file(prompts, [adapter], str(tmp_path / "out.jsonl"), greedy, engine="vllm", dtype="bfloat16")
    assert vllm.llm == (model, model, "bfloat16", True, 16)
    assert {lora for _, _, lora in vllm.requests} == {("adapter", 1, adapter)}
    rows = read(tmp_path / "out.jsonl")
    assert all(len(row["responses"]) == 3 and len(set(row["responses"])) == 1 for row in rows)


def test_vllm_stops_where_the_template_does(vllm, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it, beside a template that ends turns otherwise
    vllm_sampler(model, tokenizer, CONFIG, "auto")([[5, 6]], 0)
    assert [params.rest[3] for _, params, _ in vllm.requests] == [[0, 2]]
