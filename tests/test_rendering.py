"""What a chat template makes of a row: text that it loses, where it starts sampling, tokens over the cut."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from tests.templates import spaced_tokenizer
from tests.tiny import CHATML, tiny_tokenizer
from trl_nca.responses import ResponseTokenizer, tokenize_dataset

USER = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hm</think>Hello"}, *USER]
THOUGHT = ["<think>\nThe city.\n</think>\n\nParis", "<think>\nA guess.\n</think>\n\nRome"]

#: Keeps of an answer what stands behind its thinking, and opens the thinking for sampling (DeepSeek's distillations).
CUTS_THINKING = (
    "{{ bos_token }}{% for m in messages %}{% set c = m.content %}{% if m.role == 'user' %}{{ '<User>' + c }}"
    "{% else %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<Assistant>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
#: Parses the thinking out of the last answer and writes it in its own form, an empty block if there is none (Qwen3).
PARSES_THINKING = (
    "{% for m in messages %}{% set c, r = m.content, '' %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Reads contents as lists of parts: of a text nothing is left (SmolVLM, Idefics3).
READS_PARTS = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
#: Writes the system's text into the last turn, if it is the user's: not where a response follows (Mistral).
SYSTEM_IN_LAST_TURN = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.last and s is defined else '') }}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
#: Knows no system's turn, and says nothing of it.
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
#: Writes a block of thinking of its own into every answer.
WRITES_THINKING = CHATML.replace("m['content'] +", "('<think></think>' if m.role == 'assistant' else '') + m.content +")
OPENS_THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def tokenize(template, prompt, responses, tokenizer=None, **settings):
    tokenizer = tokenizer or tiny_tokenizer(template)
    row = {"prompt": prompt, "responses": responses, "scores": [float(k) for k in range(len(responses))]}
    return tokenizer, ResponseTokenizer(tokenizer, **settings)(row)


@pytest.mark.parametrize(
    ("template", "prompt", "responses", "reason", "detail"),
    [
        (CUTS_THINKING, USER, ["Paris", "Rome"], "prompt_not_as_sampled", "<think>"),
        (OPENS_THINKING, USER, [THOUGHT[0], "Rome"], "prompt_not_as_sampled", "response 2 lacks"),
        (READS_PARTS, USER, ["Paris", "Rome"], "prompt_not_rendered", "the user's turn"),
        (READS_PARTS, [{"role": "user", "content": "s"}], ["a", "t"], "response_not_rendered", "response 1"),
        (PARSES_THINKING, USER, ["Sure. " + THOUGHT[0], "Rome"], "response_not_rendered", "response 1"),
        (WRITES_THINKING, USER, ["Paris", THOUGHT[0]], "response_not_rendered", "other thinking before that"),
        (CHATML.replace("m['content']", "m['content'][:9]"), USER, ["Paris", "Rome"], "prompt_not_rendered", "user's"),
        (CHATML.replace("m['content']", "m['content'][:40]"), USER, ["Paris", "Rome " * 9], "response_not_rendered",
         "the text of response 2"),
        ("{{ raise_exception('No\n turns') }}", USER, ["a", "b"], "template_refused", "says: No turns"),
        ("{{ messages[0].content + 1 }}", USER, ["a", "b"], "template_refused", "the chat template says: "),
    ],
)  # fmt: skip
def test_a_template_that_does_not_write_the_row_drops_it_by_name(template, prompt, responses, reason, detail):
    _, row = tokenize(template, prompt, responses)
    assert row["dropped"] == reason
    assert detail in row["detail"]
    assert row["response_ids"] == []


@pytest.mark.parametrize(
    ("template", "prompt", "responses"),
    [
        (PARSES_THINKING, USER, THOUGHT),
        (CUTS_THINKING, USER, THOUGHT),
        (PARSES_THINKING, USER, ["<think>\n\nOdd</think>Paris", "Rome"]),
        (PARSES_THINKING, EARLIER, ["Paris", "Rome"]),
        (OPENS_THINKING, USER, THOUGHT),
        (OPENS_THINKING, USER, ["The city.\n</think>\n\nParis", THOUGHT[1]]),
        (OPENS_THINKING.replace("<think>", "[THINK]"), USER, ["The city.[/THINK]Paris", "A guess[/THINK]Rome"]),
        (WRITES_THINKING, USER, ["Paris", "Rome"]),
        (CHATML.replace("m['content']", "m['content'] | trim"), USER, [" Paris\n", "\nRome"]),
        (SYSTEM_IN_LAST_TURN, SYSTEM, ["Paris", " Rome"]),
        (SYSTEM_IN_LAST_TURN, USER, ["Paris", " Rome"]),
    ],
)
def test_prompts_end_as_sampling_starts_and_responses_keep_their_text(template, prompt, responses):
    tokenizer, row = tokenize(template, prompt, responses)
    sampled_from = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert (row["dropped"], row["broken"]) == ("", [])
    assert tokenizer.decode(row["prompt_ids"]) == sampled_from
    for text, ids in zip(responses, row["response_ids"], strict=True):
        written = sampled_from[-9:] + tokenizer.decode(ids)  # the prompt may have opened the thinking
        assert "".join(text.split()) in "".join(written.split())
        assert written.strip().endswith("<|im_end|>")


def test_what_the_prompt_opened_is_not_opened_twice():
    tokenizer, row = tokenize(OPENS_THINKING, USER, ["<think>The city.</think>Paris", THOUGHT[1]])
    first, second = (tokenizer.decode(row["prompt_ids"] + ids) for ids in row["response_ids"])
    _, sampled = tokenize(OPENS_THINKING, USER, ["The city.</think>Paris", "\nA guess.\n</think>\n\nRome"])
    assert row["response_ids"][0] == sampled["response_ids"][0], "what was sampled from it does not open it"
    assert first.endswith("assistant\n<think>\nThe city.</think>Paris<|im_end|>\n")
    assert second.endswith("assistant\n<think>\nA guess.\n</think>\n\nRome<|im_end|>\n")


def test_rows_that_break_a_rule_are_kept_when_asked_and_counted():
    rows = Dataset.from_list([{"prompt": SYSTEM, "responses": ["Paris", "Rome"], "scores": [1.0, 0.0]}])
    kept, report = tokenize_dataset(rows, tiny_tokenizer(NO_SYSTEM))
    assert report["kept_by_reason"] == {"system_not_rendered": 1}
    assert len(kept) == 1
    _, report = tokenize_dataset(rows, tiny_tokenizer(NO_SYSTEM), actions={"system_not_rendered": "drop"})
    assert report["dropped_by_reason"] == {"system_not_rendered": 1}
    assert report["examples"]["system_not_rendered"] == [": the chat template leaves out the text of the system's turn"]
    tokenizer, row = tokenize(CUTS_THINKING, USER, ["Paris", "Rome"], actions={"prompt_not_as_sampled": "keep"})
    assert row["broken"] == ["prompt_not_as_sampled"]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<Assistant>")
    assert tokenizer.decode(row["response_ids"][0]) == "Paris<|im_end|>"


TRIMS = CHATML.replace("m['content']", "m['content'] | trim")


TWICE = ["Paris", "Rome", " Paris"]


@pytest.mark.parametrize(
    ("responses", "scores", "settings", "expected"),
    [
        (TWICE, [1.0, 0.0, 0.5], {}, [0.75, 0.0]),
        (TWICE, [1.0, 0.0, 0.5], {"actions": {"duplicate_response": "keep"}}, [1.0, 0.0, 0.5]),
        (TWICE, [1.0, 0.0, 0.5], {"actions": {"duplicate_response": "drop"}}, "duplicate_response"),
        (TWICE, [1.0, 0.0, 0.5], {"min_responses": 3}, "too_few_responses"),
        (TWICE, [1.0, 0.5, 0.0], {}, "identical_scores"),
        (TWICE, [1.0, 0.5, 0.0], {"actions": {"identical_scores": "keep"}}, [0.5, 0.5]),
        (["Paris", "Paris "], [1.0, 0.0], {}, "too_few_responses"),
        (["to be or not to be", "to be or not at all"], [1.0, 0.0], {"max_length": 37}, "too_few_responses"),
    ],
)
def test_responses_that_become_the_same_tokens_are_one(responses, scores, settings, expected):
    row = {"prompt": USER, "responses": responses, "scores": scores, "fixed": []}
    done = ResponseTokenizer(tiny_tokenizer(TRIMS), **settings)(row)
    if isinstance(expected, str):
        assert done["dropped"] == expected
        assert "same tokens" in done["detail"]
    else:
        assert (done["dropped"], done["scores"]) == ("", expected)
        assert len(done["response_ids"]) == len(expected)
        assert done["merged"] == done["fixed"] == (len(expected) < len(responses))


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("text", ["\U000f0000", "a\U000effff\U000f0001<|im_end|>\U000f0002 b", "\U0010fffd\ue000"])
def test_private_use_characters_stay_what_they_are(template, text):
    prompt = [{"role": "user", "content": f"Read {text}"}]
    tokenizer, row = tokenize(template, prompt, [f"It is {text}.", "None"])
    sampled = ResponseTokenizer(tokenizer).encode_prompt(prompt)
    assert row["prompt_ids"] == sampled
    assert tokenizer.decode(sampled).count(text) == 1
    assert tokenizer.decode(row["response_ids"][0]).startswith(f"It is {text}.<|im_end|>")
    if "<" not in text:
        plain = tokenizer(f"It is {text}.<|im_end|>", add_special_tokens=False)["input_ids"]
        assert row["response_ids"][0][: len(plain)] == plain


VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
    "{{ ' ASSISTANT:' + sep + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' + sep }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["always", "first", "legacy"])
@pytest.mark.parametrize("separator", [" ", "", "\n"])
@pytest.mark.parametrize("responses", [["Paris", "Rome"], [" Paris", "\nRome"], ["It is </s>, no?", "a<s> b</s>c"]])
def test_no_space_that_the_rendering_does_not_have(kind, separator, responses):
    tokenizer = spaced_tokenizer(kind, VICUNA.replace("sep", json.dumps(separator)))
    row = {"prompt": USER, "responses": responses, "scores": [1.0, 0.0]}
    done = ResponseTokenizer(tokenizer)(row)
    prompt = tokenizer.decode(done["prompt_ids"])
    for text, ids in zip(responses, done["response_ids"], strict=True):
        whole = tokenizer.decode(done["prompt_ids"] + ids)
        assert whole == f"{prompt}{text}</s>"
        assert prompt.endswith("ASSISTANT:" + separator)


@pytest.mark.parametrize("kind", ["always", "first", "legacy"])
@pytest.mark.parametrize("prompt", ["Q: the capital? A:", "Q: the capital? A: ", "the capital is Par"])
def test_no_space_between_plain_prompt_and_response(kind, prompt):
    tokenizer = spaced_tokenizer(kind, None)
    done = ResponseTokenizer(tokenizer)({"prompt": prompt, "responses": ["Paris", "is."], "scores": [1.0, 0.0]})
    for text, ids in zip(["Paris", "is."], done["response_ids"], strict=True):
        assert tokenizer.decode(done["prompt_ids"] + ids) == f"{prompt}{text}</s>"


#: The families whose templates cannot write a row of texts, and under which rules it is dropped.
UNWRITTEN = {
    "deepseek_r1_distill": {"response_not_rendered", "prompt_not_as_sampled"},
    "deepseekv3": {"response_not_rendered", "prompt_not_as_sampled"},
    "idefics3": {"prompt_not_rendered"},
    "smolvlm": {"prompt_not_rendered"},
    "llava_next": {"prompt_not_rendered"},
    "qwen3_5_nothink": {"prompt_not_as_sampled"},
    "qwen3_8": {"response_not_rendered"},
}


@pytest.mark.parametrize("file", sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja")), ids=lambda f: f.stem)
def test_the_templates_of_well_known_families(file):
    tokenizer, dropped = tiny_tokenizer(file.read_text()), set()
    for responses in (["Paris.", " Rome\n"], THOUGHT, ["The city.\n</think>\n\nParis", "A guess.</think>Rome"]):
        _, row = tokenize(None, USER, responses, tokenizer)
        dropped.add(row["dropped"])
        if row["dropped"]:
            continue
        sampled_from = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == sampled_from
        for text, ids in zip(responses, row["response_ids"], strict=True):
            assert "".join(text.split()) in "".join((sampled_from[-9:] + tokenizer.decode(ids)).split())
    known = UNWRITTEN.get(file.stem.removesuffix("_training"), set())
    assert dropped - {""} <= known
    assert bool(dropped - {""}) == bool(known)
