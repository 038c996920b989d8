"""Talking to a model: who answers, what each of them remembers."""

import io
import json
import stat
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.sampling import chat as module
from alignment.sampling.chat import HELP, chat, speakers
from alignment.sampling.sample import SamplingConfig, sample_responses
from tests.scripts import script
from tests.templates import CHATML_SPANS, TOOLS
from tests.tiny import tiny_tokenizer

GREEDY = SamplingConfig(num_samples=1, max_new_tokens=6, temperature=0.0, batch_size=1)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """Folder of an adapter that changes what the base says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def talk(lines, name, base=None, both=False):
    said = []
    who, tokenizer = speakers(name, base)
    chat(lines, who, tokenizer, GREEDY, both, say=said.append)
    return who, said, tokenizer


def test_an_answer_is_what_the_model_says_and_is_remembered(adapter, capsys):
    who, _, tokenizer = talk(["What is Rome?\n", "And Paris?\n"], adapter)
    base, aligned = who
    assert [turn["role"] for turn in aligned.turns] == ["user", "assistant"] * 2
    assert base.turns == []
    settings, printed = {"num_samples": 1, "max_new_tokens": 6, "temperature": 0.0}, capsys.readouterr().out
    for end in (1, 3):
        ((expected,),) = sample_responses(aligned.model, tokenizer, [{"prompt": aligned.turns[:end]}], **settings)
        assert aligned.turns[end]["content"] == expected.text.strip()
        assert expected.text.strip() in printed


def test_side_by_side_the_base_is_the_model_without_its_adapter(adapter, tiny_model):
    (base, aligned), said, _ = talk(["/both", "What is Rome?"], adapter)
    assert said[:3] == ["Base and aligned answer.", "base:", ""]
    assert said[3] == "aligned:"
    (alone,), _, _ = talk(["What is Rome?"], tiny_model)
    assert base.turns == alone.turns
    assert base.turns[1] != aligned.turns[1]
    named, _, _ = talk(["What is Rome?"], tiny_model, base=tiny_model, both=True)
    assert named[0].turns == named[1].turns == alone.turns


def test_commands(adapter, tiny_model):
    who, said, _ = talk(["hello", "/new", "/what", "", "/both", "/both", "/quit", "never"], adapter)
    assert who[1].turns == []
    assert said[2:] == ["A new conversation.", HELP, "Base and aligned answer.", "One model answers."]
    _, said, _ = talk(["/both"], tiny_model)
    assert said == ["No base: see --base."]


def test_the_chat_script(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is Rome?\n/quit\n"))
    assert script(monkeypatch, "chat.py", adapter, "--both", "--max_new_tokens", "3", "--temperature", "0") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == ["base:", "aligned:"]
    assert script(monkeypatch, "chat.py", "models/nowhere") == 2
    assert "models/nowhere" in capsys.readouterr().err


def interrupt(monkeypatch, after):
    """As if Ctrl-C was typed when so many tokens of an answer are there, once."""
    put, counts = module._UntilStop.put, [after]

    def stop(self, value):
        put(self, value)
        if counts and len(self.ids) == counts[0]:
            counts.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(module._UntilStop, "put", stop)


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(adapter, monkeypatch, capsys):
    whole, _, _ = talk(["What is Rome?", "And Paris?"], adapter)
    expected = [turn["content"] for turn in whole[-1].turns]
    capsys.readouterr()
    interrupt(monkeypatch, after=3)
    who, said, tokenizer = talk(["What is Rome?", "And Paris?"], adapter)
    turns = who[-1].turns
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert 0 < len(tokenizer(turns[1]["content"])["input_ids"]) < 6
    assert expected[1].startswith(turns[1]["content"])
    assert turns[1]["content"] in capsys.readouterr().out
    interrupt(monkeypatch, after=0)
    who, _, _ = talk(["What is Rome?", "And Paris?"], adapter)
    assert [turn["content"] for turn in who[-1].turns][0] == "And Paris?", "what was not answered was not said"


def test_again_is_another_answer_to_the_same(adapter, monkeypatch):
    drawn = SamplingConfig(num_samples=1, max_new_tokens=12, temperature=1.0, batch_size=1)
    who, tokenizer = speakers(adapter, None)
    said = []
    chat(["/again", "What is Rome?"], who, tokenizer, drawn, say=said.append)
    assert said[0] == "There is no answer yet."
    first = who[-1].turns
    chat(["What is Rome?", "/again"], (others := speakers(adapter, None)[0]), tokenizer, drawn)
    assert len(others[-1].turns) == 2
    assert others[-1].turns[0] == first[0]
    assert others[-1].turns[1] != first[1]
    interrupt(monkeypatch, after=0)
    chat(["/again"], who, tokenizer, drawn)
    assert who[-1].turns == first, "stopped at once, the old answer stays"


def test_what_the_system_says(adapter, tiny_model, tmp_path):
    who, said, tokenizer = talk(["hello", "/system Be brief.", "/new", "hello", "/system", "/system Again."], adapter)
    assert [turn["role"] for turn in who[-1].turns] == ["system", "user", "assistant"]
    assert who[0].turns == [{"role": "system", "content": "Again."}], "the base's too"
    assert said[2:4] == ["The system says: Be brief.", "A new conversation."]
    assert said[-2:] == ["The system says nothing.", "The system says: Again."]
    for template, answer in (
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}?", "no system"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out what a system says"),
    ):
        tokenizer.chat_template, said = template, []
        chat(["/system Be brief."], who, tokenizer, GREEDY, say=said.append)
        assert said[0].startswith("It stays as it was: ") and answer in said[0]
        assert who[-1].turns[0]["content"] == "Again."


def test_tools_are_in_the_prompt_and_what_they_return_is_answered(adapter, tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "tools.json", []
    file.write_text(json.dumps(TOOLS))
    tokenizer = tiny_tokenizer(CHATML_SPANS)
    monkeypatch.setattr(module, "load_trained_tokenizer", lambda name, base: (tokenizer, None))
    encode = module.encode_prompt
    monkeypatch.setattr(module, "encode_prompt", lambda *given: asked.append(encode(*given)) or asked[-1])
    who, _ = speakers(adapter, None, tools=module.read_tools_file(str(file)))
    chat(["What is 17 * 23?", "/tool 391", f"/save {tmp_path}/talk.jsonl"], who, tokenizer, GREEDY)
    assert [turn["role"] for turn in who[-1].turns] == ["user", "assistant", "tool", "assistant"]
    assert "calculator" in tokenizer.decode(asked[-1])
    assert tokenizer.decode(asked[-1]).endswith("tool\n391<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((tmp_path / "talk.jsonl").read_text())["tools"] == TOOLS
    tokenizer.chat_template = tiny_tokenizer().chat_template
    assert script(monkeypatch, "chat.py", adapter, "--tools", str(file)) == 2
    assert "it leaves out the tools" in capsys.readouterr().err
    file.write_text("calculator")
    assert script(monkeypatch, "chat.py", adapter, "--tools", str(file)) == 2
    assert "tools are no list of JSON schemas" in capsys.readouterr().err
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'a', 'assistant': 'b'}[m.role] + m.content }}{% endfor %}"
    )
    said = []
    who[-1].tools = None
    chat(["/tool 391"], who, tokenizer, GREEDY, say=said.append)
    assert said[0].startswith("It cannot go on from that: ")


def test_a_conversation_is_saved_once(adapter, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = [f"/save {file}", "/both", "What is Rome?", "/save", f"/save {file}", f"/save {file}"]
    who, said, _ = talk([*lines, f"/save {tmp_path}/no/where"], adapter)
    assert said[0] == "Nothing is said yet."
    assert said[-4:] == [
        "/save FILE: name a file.", f"Saved in {file}.", f"{file} exists; name another file.",
        f"{tmp_path}/no/where cannot be written: No such file or directory",
    ]  # fmt: skip
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"model": speaker.name, "messages": speaker.turns} for speaker in who]


def test_at_the_terminal(tiny_model, tmp_path, monkeypatch, capsys):
    typed = iter(["What is Rome?", KeyboardInterrupt(), "/help", EOFError()])

    def type_line(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_line)
    for _ in range(2):
        assert script(monkeypatch, "chat.py", tiny_model, "--max_new_tokens", "3", "--temperature", "0") == 0
        typed = iter([EOFError()])
    assert capsys.readouterr().out.count(HELP) == 3
    file = tmp_path / "nca" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    typed = iter([EOFError()])
    assert script(monkeypatch, "chat.py", tiny_model) == 0
