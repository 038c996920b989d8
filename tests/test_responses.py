"""From messages to token ids: where the prompt ends, special tokens, truncation, multi-turn, several templates."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from alignment.data.prepare import describe_group
from tests.tiny import CHATML, tiny_tokenizer
from trl_nca import responses
from trl_nca.responses import ResponseTokenizer, tokenize_dataset

#: Adds a system turn of its own when there is none, as SmolLM2's does.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
#: Trims messages, writes the EOS after answers only, and has no generation prompt of its own (Llama 2, Mistral).
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
#: Writes an empty thinking block into a finished answer, but not after the generation prompt (Qwen3).
THINKING = CHATML.replace(
    "m['content'] +", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] +"
)
TEMPLATES = {"chatml": CHATML, "default-system": DEFAULT_SYSTEM, "instruct": INSTRUCT, "thinking": THINKING}

USER = [{"role": "user", "content": "What is the capital of France?"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    *USER,
]


def tokenize(prompt, responses, template=CHATML, **limits):
    tokenizer = tiny_tokenizer(template)
    row = {"prompt": prompt, "responses": responses, "scores": [float(k) for k in range(len(responses))]}
    return tokenizer, ResponseTokenizer(tokenizer, **limits)(row)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [USER, TURNS], ids=["one-turn", "multi-turn"])
def test_prompt_and_response_are_the_whole_rendering(template, prompt):
    tokenizer, row = tokenize(prompt, ["Paris.", "It is Paris, of course!"], TEMPLATES[template])
    sampled_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert row["prompt_ids"] == sampled_from  # training sees what sampling will see
    for text, ids in zip(["Paris.", "It is Paris, of course!"], row["response_ids"], strict=True):
        messages = [*prompt, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert row["prompt_ids"] + ids == whole
        assert ids.count(tokenizer.eos_token_id) == 1


def test_one_bos_where_the_template_puts_it():
    tokenizer, row = tokenize(USER, ["Paris.", "Rome."], INSTRUCT)
    assert row["prompt_ids"][0] == tokenizer.bos_token_id
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert all(tokenizer.bos_token_id not in ids for ids in row["response_ids"])


def test_responses_with_a_common_beginning_are_not_cut_into():
    tokenizer, row = tokenize(USER, ["Paris is it", "Paris was it"])
    assert tokenizer.decode(row["response_ids"][0]) == "Paris is it<|im_end|>\n"


@pytest.mark.parametrize("location", ["prompt", "response"])
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|endoftext|><|im_end|>"])
def test_special_text_in_a_message_stays_text(location, text):
    prompt = [{"role": "user", "content": f"What is {text}?" if location == "prompt" else "What?"}]
    answer = f"It is {text} itself" if location == "response" else "A token"
    tokenizer, row = tokenize(prompt, [answer, "Nothing"])
    control = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    clean_tokenizer, clean = tokenize([{"role": "user", "content": "What?"}], ["A token", "Nothing"])
    for ids, clean_ids in [
        (row["prompt_ids"], clean["prompt_ids"]),
        (row["response_ids"][0], clean["response_ids"][0]),
    ]:
        assert [i for i in ids if i in control] == [i for i in clean_ids if i in control]
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"][0]) == tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": answer}], tokenize=False
    )


def test_a_token_over_the_cut_is_split_as_in_sampling():
    # "\n\n" is one token, so the rendering's "assistant\n" + "\nParis" has a token that reaches over the cut.
    tokenizer, row = tokenize(USER, ["\nParis", "Paris"])
    both = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert len(both) == 1, "the test needs this merge"
    assert row["prompt_ids"][-1] == tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode(row["response_ids"][0]) == "\nParis<|im_end|>\n"


def test_response_given_as_messages():
    tokenizer, as_text = tokenize(USER, ["Paris", "Rome"])
    _, as_messages = tokenize(USER, [[{"role": "assistant", "content": c}] for c in ("Paris", "Rome")])
    assert as_text == as_messages


def test_plain_text_is_joined_with_one_eos():
    tokenizer, row = tokenize("Q: the capital?\nA:", [" Paris", " Rome<|im_end|>"])
    assert tokenizer.decode(row["prompt_ids"]) == "Q: the capital?\nA:"
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [" Paris<|im_end|>", " Rome<|im_end|>"]


def test_a_tokenizer_without_template_takes_single_turns_as_text():
    tokenizer, row = tokenize(USER, ["Paris", "Rome"], None)
    assert tokenizer.decode(row["prompt_ids"]) == USER[0]["content"]


def test_long_prompt_loses_its_beginning_but_not_its_bos():
    tokenizer, whole = tokenize(USER, ["Paris", "Rome"], INSTRUCT)
    _, row = tokenize(USER, ["Paris", "Rome"], INSTRUCT, max_prompt_length=10)
    assert row["prompt_ids"] == [tokenizer.bos_token_id, *whole["prompt_ids"][-9:]]
    assert row["prompt_trimmed"]
    assert row["response_ids"] == whole["response_ids"]


def test_long_response_is_cut_and_counted():
    _, whole = tokenize(USER, ["Paris", "Rome " * 30])
    limit = len(whole["prompt_ids"]) + len(whole["response_ids"][0]) + 2
    tokenizer, row = tokenize(USER, ["Paris", "Rome " * 30], max_length=limit)
    assert row["response_ids"][0] == whole["response_ids"][0]
    assert len(row["prompt_ids"]) + len(row["response_ids"][1]) == limit
    assert tokenizer.eos_token_id not in row["response_ids"][1]
    assert (row["responses_cut"], row["dropped"]) == (1, "")


def test_rows_that_cannot_fit_are_dropped_by_reason():
    rows = Dataset.from_list(
        [
            {"prompt": USER, "responses": ["Paris", "Rome"], "scores": [1.0, 0.0]},
            {"prompt": [{"role": "user", "content": "Well, " * 99}], "responses": ["a", "b"], "scores": [1.0, 0.0]},
            {"prompt": USER, "responses": ["Paris", "Rome", "Oslo"], "scores": [1.0, 0.0, 0.5]},
        ]
    )
    kept, report = tokenize_dataset(rows, tiny_tokenizer(), max_length=80)
    assert kept["scores"][:] == [[1.0, 0.0], [1.0, 0.0, 0.5]]
    assert set(kept.column_names) == {"prompt_ids", "response_ids", "token_masks", "scores", "length", "location"}
    assert report == {
        "rows_in": 3,
        "rows_kept": 2,
        "rows_fixed": 0,
        "rows_dropped": 1,
        "dropped_by_reason": {"prompt_too_long": 1},
        "examples": {"prompt_too_long": [": 611 tokens, and max_length is 80"]},
        "rows_merged": 0,
        "kept_by_reason": {},
        "responses": 5,
        "responses_cut": 0,
        "prompts_trimmed": 0,
    }


def test_a_row_that_the_template_refuses_is_dropped_by_reason():
    alternating = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    _, row = tokenize([{"role": "assistant", "content": "Hi"}], ["a", "b"], alternating)
    assert row["dropped"] == "template_refused"


@pytest.mark.parametrize("max_length", [None, 100])
def test_a_prompt_without_tokens_is_dropped_by_reason(max_length):
    _, row = tokenize("", ["Paris", "Rome"], max_length=max_length)  # this tokenizer adds no BOS of its own
    assert row["prompt_ids"] == []
    assert row["dropped"] == "empty_prompt"


def test_describe_group_shows_text_mask_and_eos():
    tokenizer, row = tokenize(USER, ["Paris", "Rome"])
    text = describe_group(row, tokenizer)
    assert "mask 0" in text
    assert "Paris<|im_end|>" in text
    assert "ends with EOS" in text


def test_describe_group_shows_which_tokens_count():
    tokenizer, row = tokenize(USER, ["Paris", "Rome"])
    row["token_masks"] = [[i > 1 for i in range(len(ids))] for ids in row["response_ids"]]
    text = describe_group(row, tokenizer)
    num = len(row["response_ids"][0])
    first, second, third = tokenizer.convert_ids_to_tokens(row["response_ids"][0])[:3]
    assert f"response 1, score 0 ({num} tokens, mask 1 on {num - 2} of them, ends with EOS)" in text
    assert f"\n  mask 0: {tokenizer.decode(row['response_ids'][0][:2])!r}\n  mask 1: " in text
    assert f"\n{first!r}:0 {second!r}:0 {third!r}:1" in text


def test_over_long_rows_are_cut_or_dropped_and_counted_as_fixed():
    rows = Dataset.from_list(
        [
            {"prompt": USER, "responses": ["Paris", "Rome"], "scores": [1.0, 0.0], "fixed": ["text_score"]},
            {"prompt": USER, "responses": ["Paris", "Rome " * 50], "scores": [1.0, 0.0], "fixed": []},
            {"prompt": USER, "responses": ["Paris", "Oslo"], "scores": [1.0, 0.0], "fixed": []},
        ]
    )
    kept, report = tokenize_dataset(rows, tiny_tokenizer(), max_length=80)
    assert (report["rows_kept"], report["rows_fixed"], report["responses_cut"]) == (3, 2, 1)
    kept, report = tokenize_dataset(rows, tiny_tokenizer(), max_length=80, actions={"over_long": "drop"})
    assert (report["rows_kept"], report["rows_fixed"], report["responses_cut"]) == (2, 1, 0)
    assert report["dropped_by_reason"] == {"over_long": 1}


def test_large_data_sets_are_tokenized_in_pieces_that_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(responses, "_PIECE_ROWS", 4)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "p {i}", "responses": ["a", "b {i}"], "scores": [1, 0]}}\n' for i in range(10))
    )
    rows = Dataset.from_json(str(path))
    whole, _ = tokenize_dataset(rows.select(range(10)), tiny_tokenizer())
    tokenize, done = ResponseTokenizer.__call__, []

    def killed(self, row):
        if row["prompt"] == "p 6":
            raise KeyboardInterrupt
        return tokenize(self, row)

    def noted(self, row):
        done.append(row["prompt"])
        return tokenize(self, row)

    # Other rows, so that nothing is there yet.
    rows = rows.map(lambda row: {"prompt": row["prompt"]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResponseTokenizer, "__call__", killed)
        tokenize_dataset(rows, tiny_tokenizer())
    monkeypatch.setattr(ResponseTokenizer, "__call__", noted)
    kept, report = tokenize_dataset(rows, tiny_tokenizer())
    assert set(done) == {f"p {i}" for i in range(4, 10)}
    assert kept[:] == whole[:]
    assert report["rows_in"] == 10


def test_the_cache_key_is_of_contents_and_not_of_objects(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    key = ResponseTokenizer(loaded, 80, 40).key("rows")
    loaded(["a", "b b"], padding=True, truncation=True, max_length=5)  # which leaves a state behind
    assert ResponseTokenizer(loaded, 80, 40).key("rows") == key
    assert ResponseTokenizer(AutoTokenizer.from_pretrained(tmp_path), 80, 40).key("rows") == key
    other_template, other_vocabulary = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    other_template.chat_template = INSTRUCT
    other_vocabulary.add_tokens(["Paris"])
    others = [
        ResponseTokenizer(loaded, 81, 40).key("rows"),
        ResponseTokenizer(loaded, 80, 41).key("rows"),
        ResponseTokenizer(loaded, 80, 40, actions={"over_long": "drop"}).key("rows"),
        ResponseTokenizer(loaded, 80, 40).key("other rows"),
        ResponseTokenizer(other_template, 80, 40).key("rows"),
        ResponseTokenizer(other_vocabulary, 80, 40).key("rows"),
    ]
    assert len({key, *others}) == 7
