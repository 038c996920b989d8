"""Where generation stops: at the EOS, and at the token that the chat template writes behind an answer."""

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig

from alignment.data.prepare import describe_group, warn_of_ends
from alignment.errors import UserError
from alignment.sampling.chat import Speaker, chat
from alignment.sampling.sample import SamplingConfig, encode_prompt, generation_settings, read_sample, sample_batch
from tests.tiny import CHATML, tiny_tokenizer
from trl_nca.responses import tokenize_dataset
from trl_nca.stops import end_of_turn, stop_tokens

GREEDY = SamplingConfig(num_samples=1, max_new_tokens=3, temperature=0)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
USER = [{"role": "user", "content": "What is Rome?"}]


def base_tokenizer(template=CHATML):
    """As base models have it: the EOS is the end of a document, whatever the template writes."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def without_end(template=None):
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ bos_token + m.content | trim + ' \n' + eos_token }}{% endfor %}", "<|endoftext|>"),
        (NO_END, None),
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}", "<|im_start|>"),
        (CHATML.replace("+ '<|im_end|>' +", "+ ('' if loop.last else '<|im_end|>') +"), "<|im_end|>"),
        (None, None),
        ("{{ raise_exception('a system turn first') }}", None),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}", None),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(template, end):
    tokenizer = base_tokenizer(template)
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_stops_are_of_the_model_the_tokenizer_and_its_template():
    assert stop_tokens(base_tokenizer()) == [0, 2]
    assert stop_tokens(base_tokenizer(), GenerationConfig(eos_token_id=7)) == [0, 2, 7]
    assert stop_tokens(tiny_tokenizer(), GenerationConfig(eos_token_id=[2, 9])) == [2, 9]
    assert stop_tokens(without_end(NO_END), GenerationConfig()) == []
    plain = base_tokenizer(CHATML.replace("<|im_end|>", "<end>"))
    plain.add_tokens([AddedToken("<end>", special=False), AddedToken("\n", special=False)])
    assert stop_tokens(plain) == [0, plain.convert_tokens_to_ids("<end>")]


def test_sampling_stops_there(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), base_tokenizer()
    model.generation_config.eos_token_id = 0
    assert generation_settings(model, tokenizer, GREEDY)["eos_token_id"] == [0, 2]
    ids = tokenizer("It is.<|im_end|>\n<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert read_sample(ids, tokenizer, [0, 2]) == ("It is.", True)
    assert read_sample(ids[:2], tokenizer, [0, 2])[1] is False


@pytest.mark.parametrize("template", [None, NO_END])
def test_without_any_end_sampling_runs_to_its_limit(tiny_model, template, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), without_end(template)
    model.generation_config.eos_token_id = None
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("Rome?", "What is the capital?")]
    samples = sample_batch(ids, 0, model, tokenizer, GREEDY)
    assert [[finished for _, finished in drawn] for drawn in samples] == [[False], [False]]
    alone = [sample_batch([each], 0, model, tokenizer, GREEDY)[0] for each in ids]
    assert samples == alone, "padding is masked"
    chat(["What is Rome?"], [Speaker("aligned", model)], tokenizer, GREEDY)
    assert capsys.readouterr().out.strip()


def test_a_second_turn_needs_a_template(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), tiny_tokenizer(None)
    with pytest.raises(UserError, match="chat_template: the tokenizer of .* has none, .* one message and not 3"):
        chat(["hello", "and again"], [Speaker("aligned", model)], tokenizer, GREEDY)


@pytest.mark.parametrize(
    ("tokenizer", "warning", "shown"),
    [
        (tiny_tokenizer(), None, "ends with EOS"),
        (base_tokenizer(), None, "ends with <|im_end|>, where sampling stops"),
        (base_tokenizer(NO_END), "no response ends where sampling stops (at <|endoftext|>)", "has no token at its end"),
        (without_end(NO_END), "no response has an end: the tokenizer has no EOS", "has no token at its end"),
        (without_end(), "no response has an end: the tokenizer has no EOS", "has no token at its end"),
    ],
)
def test_a_run_whose_responses_have_no_end_says_so(tokenizer, warning, shown):
    rows = Dataset.from_list([{"prompt": USER, "responses": ["A city", "No"], "scores": [1.0, 0.0]}])
    rows, _ = tokenize_dataset(rows, tokenizer)
    said = warn_of_ends(rows, tokenizer)
    assert len(said) == (warning is not None)
    assert (warning or "") in "".join(said)
    assert shown in describe_group(rows[0], tokenizer)
