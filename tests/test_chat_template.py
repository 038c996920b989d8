"""`chat_template_kwargs` of a recipe: defaults in the template itself, which everybody who renders with it sees."""

import json

import pytest
from transformers import AutoTokenizer

from alignment.models import PolicyConfig, load_tokenizer
from alignment.recipe.chat_template import read_kwargs, with_defaults
from alignment.sampling.sample import encode_prompt
from alignment.serving.modelfile import modelfile
from tests.templates import FAMILIES, QWEN3, TOOLS, TRAJECTORIES, user
from tests.tiny import CHATML, save_tiny_model, tiny_tokenizer
from trl_nca.responses import ResponseTokenizer

PROMPT = [user("What is 17 * 23?")]
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "value", [True, None, 3, -0.5, 1e-7, "high", 'a "b" \\ \n{% x %} }} é \U0001f600', ["a", 1], {"a": {"b": [None]}}]
)
@pytest.mark.parametrize("start", ["", "\n", "\n\n  ", "   {% if true %}{% endif %}", "{#- no -#}\n"])
def test_a_default_is_what_the_template_reads_unless_it_is_given(start, value):
    plain = tiny_tokenizer(
        start + "{{ messages[0].content }}{% if level is defined %}{{ level | tojson }}{% endif %}\n"
    )
    text = plain.apply_chat_template(PROMPT, tokenize=False, level=value)
    other = plain.apply_chat_template(PROMPT, tokenize=False, level=7)
    tokenizer = tiny_tokenizer(with_defaults(plain.chat_template, read_kwargs(json.dumps({"level": value}))))
    assert tokenizer.apply_chat_template(PROMPT, tokenize=False) == text
    assert tokenizer.apply_chat_template(PROMPT, tokenize=False, level=7) == other


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_of_a_template_changes(family):
    plain, changed = tiny_tokenizer(FAMILIES[family]), tiny_tokenizer()
    changed.chat_template = with_defaults(FAMILIES[family] + "{# unread #}", {"unread": 1})
    for turns in TRAJECTORIES.values():
        row = {"prompt": PROMPT, "responses": [turns, "No idea"], "scores": [1, 0], "tools": TOOLS}
        assert ResponseTokenizer(changed)(row) == ResponseTokenizer(plain)(row)


def test_training_sampling_and_the_saved_tokenizer_see_it_and_a_row_says_more(tmp_path):
    name = save_tiny_model(tmp_path / "model")
    tiny_tokenizer(QWEN3).save_pretrained(name)
    config = PolicyConfig(model_name_or_path=name, chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}
    load_tokenizer(config).save_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    row = {"prompt": PROMPT, "responses": ["391", "No idea"], "scores": [1, 0]}
    trained = ResponseTokenizer(tokenizer)(row)
    assert tokenizer.decode(trained["prompt_ids"]).endswith(EMPTY)
    assert [tokenizer.decode(ids) for ids in trained["response_ids"]] == ["391<|im_end|>\n", "No idea<|im_end|>\n"]
    assert encode_prompt(tokenizer, PROMPT) == trained["prompt_ids"]
    assert EMPTY.split("assistant")[1].replace("\n", "\\n") in modelfile(tokenizer, []).replace("\n", "\\n")
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    assert ResponseTokenizer(tokenizer)(row | own)["prompt_ids"] == encode_prompt(tiny_tokenizer(QWEN3), PROMPT)
    again = with_defaults(tokenizer.chat_template, config.chat_template_kwargs)
    assert again == tokenizer.chat_template, "a second run from the saved model adds nothing"


def test_a_tokenizer_with_two_templates_has_it_in_both():
    both = with_defaults({"default": "{{ quick }}", "tool_use": "{{ quick }} {{ tools }}"}, {"quick": True})
    assert all(template.startswith("{%- if quick is not defined %}") for template in both.values())
    assert CHATML not in both.values()
