"""Responses of several turns: ids as sampling sees them at each turn, and which of them are the assistant's."""

import html
import json
import random
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from tests.templates import (
    CHATML_SPANS,
    FAMILIES,
    GPT_OSS,
    LLAMA3,
    QWEN3,
    TOOLS,
    TRAJECTORIES,
    VARIANTS,
    assistant,
    family_tokenizer,
    spaced_tokenizer,
    tool,
    user,
    variant,
)
from tests.tiny import CHATML, tiny_tokenizer
from trl_nca.rendering.messages import RefusedRow, clean_message, clean_messages, read_tools
from trl_nca.rendering.written import lost_part
from trl_nca.responses import ResponseTokenizer, tokenize_dataset

PROMPT = [user("What is 17 times 23?")]
RNR, TNF, CNR, PNS, REFUSED = (
    "response_not_rendered", "turns_not_found", "calls_not_rendered", "prompt_not_as_sampled", "template_refused"
)  # fmt: skip

#: Which trajectories the families cannot write as one sequence of tokens, and under which rule they are dropped.
DROPPED = {
    "qwen3": {"reasoned, user in between": RNR},
    "llama3": {"reasoned": RNR, "reasoned call": RNR, "reasoned, user in between": RNR, "two calls": REFUSED},
    "mistral": {
        "reasoned": RNR, "reasoned call": RNR, "reasoned, user in between": RNR, "call, user, call": TNF,
    },
    "deepseek_r1": {
        "answer": PNS, "call": CNR, "reasoned call": CNR, "two calls": CNR, "user in between": PNS,
        "reasoned, user in between": RNR, "call, user, call": CNR, "ends with a call": CNR,
    },
    "gpt_oss": {"two calls": CNR, "reasoned, user in between": RNR},
    "chatml_spans": {},
}  # fmt: skip


def tokenize(template, responses, tools=None, kwargs=None, prompt=PROMPT, **settings):
    tokenizer = family_tokenizer(template) if isinstance(template, str) else template
    tokenize_row = ResponseTokenizer(tokenizer, **settings)
    row = {"prompt": prompt, "responses": responses, "scores": [float(k) for k in range(len(responses))]}
    return tokenize_row, tokenize_row(row | {"tools": tools, "chat_template_kwargs": kwargs})


def tools_of(turns):
    return TOOLS if any("tool_calls" in turn for turn in turns) else None


def runs(mask):
    """The (start, stop) of the tokens that count."""
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def masks_of(row):
    return row["token_masks"] or [[True] * len(ids) for ids in row["response_ids"]]


def with_other(turns):
    """The turns, and others that end otherwise."""
    return [turns, [*turns[:-1], {**turns[-1], "content": "No idea."}] if "tool_calls" not in turns[-1] else "No idea."]


def counted_texts(tokenizer, row, k=0):
    """What counts of a response, a text for each run of tokens."""
    return [tokenizer.decode(row["response_ids"][k][a:b]) for a, b in runs(masks_of(row)[k])]


def check_as_sampled(tokenize, row, k, turns, tools=None, kwargs=None, exact=True, last=False):
    """Holds a response to what sampling sees: at each turn the prompt's ids, then what counts, and nothing else.

    Where tokens reach over the beginning of a turn, not exact, the texts are the same.
    """
    decode = (lambda ids: ids) if exact else tokenize.tokenizer.decode
    whole = row["prompt_ids"] + row["response_ids"][k]
    mask = [False] * len(row["prompt_ids"]) + masks_of(row)[k]
    indices = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][-1 if last else 0 :]
    counted = runs(mask)
    assert len(counted) == len(indices)
    for i, (start, stop) in zip(indices, counted, strict=True):
        sampled_from = tokenize.encode_prompt([*PROMPT, *turns[:i]], tools, kwargs)
        assert decode(whole[:start]) == decode(sampled_from), i
        text = tokenize.tokenizer.decode(whole[start:stop])
        for part in (turns[i]["content"], turns[i].get("reasoning_content", "")):
            assert part in text, text
        assert text.count("17 * 23") == str(turns[i]).count("17 * 23")
        assert not any(turn["content"] in text for turn in turns if turn["role"] == "user"), text
    assert counted[-1][1] == len(whole), "what stands behind the last token that counts is not run"


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_goes_on_from_what_sampling_sees_or_the_row_is_dropped_by_name(family, trajectory):
    turns = TRAJECTORIES[trajectory]
    tokenize_row, row = tokenize(FAMILIES[family], with_other(turns), tools_of(turns))
    assert (row["dropped"], row["broken"]) == (DROPPED[family].get(trajectory, ""), []), row["detail"]
    if not row["dropped"]:
        check_as_sampled(tokenize_row, row, 0, turns, tools_of(turns))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["family", "tiny"])
def test_so_it_is_with_any_template_of_their_parts(seed, kind):
    rng, tokenizer = random.Random(seed), (family_tokenizer if kind == "family" else tiny_tokenizer)(CHATML)
    for _ in range(8):
        parts = {name: rng.choice(values) for name, values in VARIANTS.items()}
        tokenizer.chat_template = variant(**parts)
        is_kept = parts["tools"] == "system" and not parts["opens"] and parts["thinking"] in ("unknown", "kept")
        for name, turns in TRAJECTORIES.items():
            tokenize_row, row = tokenize(tokenizer, with_other(turns), tools_of(turns))
            if row["dropped"]:
                assert not is_kept or ("reasoned" in name and parts["thinking"] == "unknown"), (parts, name, row)
            else:
                # Line ends on both sides of a turn's end become one token, unless a special token keeps them apart.
                is_apart = parts["end"] in ("<|im_end|>", "<|end|>") or not parts["head"].startswith("\n")
                check_as_sampled(tokenize_row, row, 0, turns, tools_of(turns), exact=kind == "family" and is_apart)
                *earlier, _ = counted_texts(tokenizer, row)
                end = parts["end"] if parts["spans"] != "text" else ""
                assert all(text.rstrip("\n").endswith(end) for text in earlier), (parts, earlier)
                assert not end or not any(text.endswith("<|im_start|>") for text in earlier), (parts, earlier)


def test_line_ends_behind_a_turns_end_are_tokenized_with_what_follows():
    parts = {name: values[0] for name, values in VARIANTS.items()} | {"head": "\n{role}:\n", "tail": "\n"}
    turns = TRAJECTORIES["call, user, call"]
    tokenize_row, row = tokenize(variant(**parts), with_other(turns), TOOLS)
    check_as_sampled(tokenize_row, row, 0, turns, TOOLS)
    texts = counted_texts(tokenize_row.tokenizer, row)
    assert all(text.endswith("<|im_end|>") for text in texts[:-1]), (
        "the line end is half of a token that is not sampled"
    )


#: Families of TRL's that write no calls, or only lists of parts.
NO_CALLS = "cohere deepseek gemma_ gemma3 idefics3 lfm2_training llama3_training llava_next phi3 qwen2_5_vl smolvlm"


@pytest.mark.parametrize("file", sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja")), ids=lambda f: f.stem)
def test_trajectories_in_the_templates_of_well_known_families(file):
    tokenizer, reasons = family_tokenizer(file.read_text()), {}
    for name in ("call", "reasoned call", "call, user, call"):
        turns = TRAJECTORIES[name]
        tokenize_row, row = tokenize(tokenizer, with_other(turns), TOOLS)
        reasons[name] = row["dropped"]
        if not row["dropped"] and not file.stem.startswith("diffusion_gemma"):  # which adds a head of its own
            check_as_sampled(tokenize_row, row, 0, turns, TOOLS, exact=False)
    assert {*reasons.values()} <= {"", RNR, TNF, CNR, PNS, REFUSED, "prompt_not_rendered"}
    stem = f"{file.stem}_"
    has_calls = not any(stem.startswith(name) for name in NO_CALLS.split()) and stem not in ("llama3_", "lfm2_")
    rewrites = stem.startswith("nemotron")  # takes an empty block of thinking out of earlier turns, behind its opening
    assert (reasons["call"] == "") == (has_calls and not rewrites), reasons


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "gpt_oss", "chatml_spans"])
def test_the_last_turn_alone_counts_and_earlier_ones_lose_their_thinking_as_in_sampling(family, trajectory):
    turns = TRAJECTORIES[trajectory]
    tokenize_row, row = tokenize(FAMILIES[family], with_other(turns), tools_of(turns), score_tokens="last")
    if row["dropped"]:
        assert row["dropped"] == DROPPED[family][trajectory], row["detail"]
    else:
        check_as_sampled(tokenize_row, row, 0, turns, tools_of(turns), last=True)
    if (family, trajectory) in (("qwen3", "reasoned, user in between"), ("mistral", "call, user, call")):
        assert row["dropped"] == "", "dropped where all turns count"


def test_all_tokens_behind_the_prompt_count():
    turns = [*TRAJECTORIES["call"], user("Thanks!")]
    tokenize_row, row = tokenize(QWEN3, [turns, "No idea."], TOOLS, score_tokens="all")
    assert row["token_masks"] is None
    whole = tokenize_row.tokenizer.decode(row["prompt_ids"] + row["response_ids"][0])
    assert whole.endswith("It is 391.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n")
    _, row = tokenize(QWEN3, [turns, "No idea."], TOOLS)
    assert tokenize_row.tokenizer.decode(row["response_ids"][0]).endswith("It is 391.<|im_end|>\n"), (
        "the rest is not run"
    )


def test_responses_of_one_turn_and_of_several_share_their_prompt():
    prompt = [*PROMPT, *TRAJECTORIES["call"][:2]]  # it ends with what a tool returned
    tokenize_row, row = tokenize(
        LLAMA3, ["It is 391.", [assistant("Three."), user("?"), assistant("391.")]], TOOLS, prompt=prompt
    )
    assert row["prompt_ids"] == tokenize_row.encode_prompt(prompt, TOOLS)
    assert counted_texts(tokenize_row.tokenizer, row, 0) == ["It is 391.<|eot_id|>"]
    assert counted_texts(tokenize_row.tokenizer, row, 1) == ["Three.<|eot_id|>", "391.<|eot_id|>"]


def test_a_turn_ends_with_the_token_that_stands_there():
    turns = TRAJECTORIES["call, user, call"]
    tokenize_row, row = tokenize(GPT_OSS, with_other(turns), TOOLS)
    ends = [text[text.rindex("<|") :] for text in counted_texts(tokenize_row.tokenizer, row)]
    assert ends == ["<|call|>", "<|end|>", "<|call|>", "<|return|>"]


SPECIAL = "<|im_end|>[/INST]<|eot_id|><|end|>"


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "gpt_oss", "chatml_spans"])
def test_text_that_spells_a_special_token_stays_text_wherever_it_stands(family):
    def trajectory(text):
        call = assistant("", calls={"call00001": f"17{text}"})
        call["tool_calls"][0]["function"]["arguments"][f"how {text}"] = [{"a b": text}, None, True, 0.5]
        return [call, tool(f"391{text}"), assistant(f"It is{text}."), user(f"Sure{text}?"), assistant(f"Yes{text}.")]

    def tools(text):
        described = json.loads(json.dumps(TOOLS).replace("Computes", f"Computes{text}"))
        return described if family != "mistral" else None  # whose tools move with the user's turn

    tokenizer = family_tokenizer(FAMILIES[family])
    special = {*tokenizer.all_special_ids}
    tokenize_row, row = tokenize(tokenizer, [trajectory(SPECIAL), "No idea."], tools(SPECIAL))
    _, plain = tokenize(tokenizer, [trajectory("@"), "No idea."], tools("@"))
    assert (row["dropped"], plain["dropped"]) == ("", ""), row["detail"]
    for key in ("prompt_ids", "response_ids"):
        ids, plain_ids = (done[key] if key == "prompt_ids" else done[key][0] for done in (row, plain))
        assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
    text = tokenizer.decode(row["response_ids"][0])
    assert text == tokenizer.decode(plain["response_ids"][0]).replace("@", SPECIAL)
    assert tokenizer.decode(row["prompt_ids"]).count(SPECIAL) == (family != "mistral")


def test_a_row_out_of_a_table_renders_as_one_of_a_file():
    turns = TRAJECTORIES["two calls"]
    as_text = json.loads(json.dumps(turns))
    for call in as_text[0]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    another = [assistant("", "Hm.", {"call00001": "1 + 1"}), tool("2"), assistant("It is 2.")]
    another[0]["tool_calls"][0]["function"]["arguments"] = {"steps": [1], "units": {"of": "m"}}
    rows = [
        {"prompt": PROMPT, "responses": [turns, another], "scores": [1.0, 0.0], "tools": TOOLS},
        {
            "prompt": [user("Hi"), assistant("Hello"), *PROMPT],
            "responses": [another, turns],
            "scores": [1.0, 0.0],
            "tools": TOOLS,
        },
    ]
    tokenizer = family_tokenizer(QWEN3)
    expected = [ResponseTokenizer(tokenizer)(row) for row in rows]
    assert [row["dropped"] for row in expected] == ["", ""]
    table = Dataset.from_list(rows)
    assert table[0]["prompt"] != PROMPT or table[0]["responses"][0] != turns, "Arrow fills keys up"
    kept, _ = tokenize_dataset(table, tokenizer)
    for key in ("prompt_ids", "response_ids", "token_masks"):
        assert kept[key][:] == [row[key] for row in expected]
    _, row = tokenize(tokenizer, [as_text, another], json.dumps(TOOLS), json.dumps({"unread": 1}))
    assert row["response_ids"] == expected[0]["response_ids"]


def test_what_says_nothing_is_cleaned_away():
    message = {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": "", "name": None}
    assert clean_message(message) == {"role": "assistant", "content": ""}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None, "b": "", "c": [None]}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    (kept,), (filled, _) = clean_messages([[asks]]), clean_messages([[asks], [message]])
    assert kept[0]["tool_calls"] == [call], "nothing else is null: it was meant"
    arguments = filled[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"b": "", "c": [None]}, "a table fills all messages up"
    call["function"]["arguments"] = "no JSON"
    assert clean_message(asks)["tool_calls"] == [call]
    optional = {"name": "f", "parameters": {"properties": {"a": {"type": "string", "default": None}}}}
    assert read_tools([optional]) == read_tools(json.dumps([optional])) == [optional]
    assert read_tools([optional | {"strict": None}])[0]["parameters"]["properties"]["a"] == {"type": "string"}


NO_RESULTS = QWEN3.replace("m.content + '\\n</tool_response>'", "'\\n</tool_response>'")
NO_ARGUMENTS = QWEN3.replace("(call.function.arguments | tojson)", "'{}'")
FIRST_CALL = QWEN3.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
NO_TOOLS = QWEN3.replace("{%- if tools %}", "{%- if false %}")


@pytest.mark.parametrize(
    ("template", "trajectory", "detail"),
    [
        (NO_RESULTS, "call", "the text of the tool's turn in response 1"),
        (NO_ARGUMENTS, "call", "a call in turn 1 of response 1"),
        (FIRST_CALL, "two calls", "a call in turn 1 of response 1"),
        (NO_TOOLS, "call", "the tools (calculator)"),
        (CHATML, "ends with a call", "the tools (calculator)"),
    ],
)
def test_calls_and_results_that_a_template_loses_are_named(template, trajectory, detail):
    _, row = tokenize(template, [TRAJECTORIES[trajectory], "No idea, 17 * 23 by calculator: 391, 8."], TOOLS)
    assert row["dropped"] == CNR
    assert detail in row["detail"]
    _, row = tokenize(template, [TRAJECTORIES[trajectory], "No idea."], TOOLS, actions={CNR: "keep"})
    assert (row["dropped"], row["broken"]) == ("", [CNR])


@pytest.mark.parametrize("write", [str, json.dumps, lambda text: json.dumps(json.dumps(text)), repr, html.escape])
def test_what_is_called_with_is_found_as_templates_write_it(write):
    value = 'it\'s "5 < é"\n'
    message = assistant("", calls={"call00001": value})
    assert lost_part(f"calculator(expression={write(value)}, {write(value)})", message) is None
    assert lost_part(f"calculator(expression={write(value[1:])})", message) == "calls"


def test_calls_and_tools_are_not_found_in_what_others_say():
    said = [assistant("The calculator takes the expression 17 * 23.", calls={"call00001": "17 * 23"})]
    _, row = tokenize(CHATML, [said, "No idea."])
    assert row["dropped"] == CNR and "a call in response 1" in row["detail"]
    _, row = tokenize(CHATML, ["391.", "No idea."], TOOLS, prompt=[user("Without the calculator: 17 * 23?")])
    assert row["dropped"] == CNR and "the tools (calculator)" in row["detail"]


def test_calls_of_a_prompt_are_looked_for_too():
    prompt = [*PROMPT, *TRAJECTORIES["call"][:2]]
    for template, what in ((NO_RESULTS, "the tool's turn"), (NO_ARGUMENTS, "a call in the assistant's turn")):
        _, row = tokenize(template, ["It is 391.", "No idea."], TOOLS, prompt=prompt)
        assert row["dropped"] == CNR and what in row["detail"]
    tokenize_row, _ = tokenize(NO_TOOLS, ["a", "b"])
    with pytest.raises(RefusedRow, match="calls_not_rendered"):
        tokenize_row.encode_prompt(PROMPT, TOOLS)
    with pytest.raises(RefusedRow, match="prompt_not_rendered"):
        tokenize(NO_RESULTS, ["a", "b"])[0].encode_prompt(prompt, TOOLS)


@pytest.mark.parametrize(
    ("responses", "tools", "kwargs", "prompt", "reason"),
    [
        ([[user("?")], "a"], None, None, PROMPT, "no_assistant_turn"),
        ([[], "a"], None, None, PROMPT, "no_assistant_turn"),
        ([[tool("391"), assistant("a")], "a"], None, None, PROMPT, "no_assistant_turn"),
        (["a", "b"], "calculator", None, PROMPT, "bad_tools"),
        (["a", "b"], {"name": "calculator"}, None, PROMPT, "bad_tools"),
        (["a", "b"], [1], None, PROMPT, "bad_tools"),
        (["a", "b"], None, "fast", PROMPT, "bad_tools"),
        (["a", "b"], None, {"add_generation_prompt": True}, PROMPT, "bad_tools"),
        (["a", "b"], TOOLS, None, "What is 17 times 23?", CNR),
        ([TRAJECTORIES["call"], "b"], None, None, "What is 17 times 23?", REFUSED),
        ([[assistant("a", "Hm.")], "b"], None, None, "What is 17 times 23?", REFUSED),
    ],
)
def test_rows_that_cannot_be_read_are_dropped_by_name(responses, tools, kwargs, prompt, reason):
    _, row = tokenize(CHATML_SPANS, responses, tools, kwargs, prompt)
    assert row["dropped"] == reason, row["detail"]


def test_a_rows_own_arguments_reach_the_template():
    off = {"enable_thinking": False}
    tokenize_row, row = tokenize(QWEN3, ["It is 391.", "No idea."], kwargs=off)
    assert row["prompt_ids"] == tokenize_row.encode_prompt(PROMPT, chat_template_kwargs=json.dumps(off))
    assert tokenize_row.tokenizer.decode(row["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
    assert counted_texts(tokenize_row.tokenizer, row) == ["It is 391.<|im_end|>\n"]
    _, row = tokenize(QWEN3, with_other(TRAJECTORIES["user in between"]), kwargs=off)
    assert row["dropped"] == TNF, "sampling starts behind an empty block, of which later turns see nothing"


#: Begins the last answer otherwise than the same turn once others follow; its spans say what the assistant wrote.
CHANGES_LAST = CHATML_SPANS.replace("{{- m.content }}", "{{- ('Finally: ' if loop.last else '') + m.content }}")
#: Its spans are of another text.
ELSEWHERE = CHATML_SPANS.replace("{%- generation %}", "{%- generation %}{{ '' }}{% endgeneration %}").replace(
    "{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}"
)


def test_spans_decide_what_counts_and_where_turns_are_that_sampling_does_not_see():
    turns = TRAJECTORIES["user in between"]
    tokenize_row, row = tokenize(CHATML_SPANS, ["It is 391.", turns])
    assert counted_texts(tokenize_row.tokenizer, row, 0) == ["It is 391.<|im_end|>"], "not the line end"
    _, row = tokenize(CHANGES_LAST, [turns, "No idea."])
    assert row["dropped"] == PNS
    assert "turn 1 of response 1, or what stands before it, otherwise once other turns follow" in row["detail"]
    tokenize_row, row = tokenize(CHANGES_LAST, [turns, "No idea."], actions={PNS: "keep"})
    assert row["broken"] == [PNS]
    assert counted_texts(tokenize_row.tokenizer, row) == ["Which one?<|im_end|>", "Finally: It is 391.<|im_end|>"]
    behind = CHATML_SPANS.replace(
        "{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- endgeneration %}{{- 'he end' }}"
    )
    tokenize_row, row = tokenize(behind, ["It is t", "No idea."])
    assert counted_texts(tokenize_row.tokenizer, row) == ["It is the"], "a token that reaches out of a span counts"
    cuts = CHATML_SPANS.replace("{{- m.content }}", "{{- m.content.split('</think>')[-1] }}")
    cuts = cuts.replace("m.reasoning_content + '</think>' if m.reasoning_content", "'</think>' if false")
    tokenize_row, row = tokenize(cuts, [[assistant("391.", "Hm.")], "<think>\nEr.\n</think>\n\nNo idea."])
    assert counted_texts(tokenize_row.tokenizer, row) == ["<think>\nHm.\n</think>\n\n391.<|im_end|>"]
    _, row = tokenize(ELSEWHERE, ["It is 391.", "No idea."])
    assert row["dropped"] == TNF and "generation" in row["detail"]


def test_reasoning_is_kept_as_sampling_writes_it_or_named():
    thought = [assistant("It is 391.", "Twenty times, less three.")]
    for family, expected in (
        ("deepseek_r1", "Twenty times, less three.\n</think>\n\nIt is 391.<|im_end|>"),
        ("qwen3", "<think>\nTwenty times, less three.\n</think>\n\nIt is 391.<|im_end|>\n"),
        ("gpt_oss", "<|channel|>analysis<|message|>Twenty times, less three.<|end|><|start|>assistant"
         "<|channel|>final<|message|>It is 391.<|return|>"),
    ):  # fmt: skip
        tokenize_row, row = tokenize(FAMILIES[family], [thought, [assistant("391.", "Hm.")]])
        assert counted_texts(tokenize_row.tokenizer, row) == [expected]
        inside = [{"role": "assistant", "content": "<think>\nTwenty times, less three.\n</think>\n\nIt is 391."}]
        for name in ("thinking", "reasoning"):  # older names for it
            other = [{"role": "assistant", "content": "It is 391.", name: "Twenty times, less three."}]
            _, again = tokenize(FAMILIES[family], [other, [assistant("391.", "Hm.")]])
            assert again["response_ids"] == row["response_ids"]
        if family != "gpt_oss":
            _, row = tokenize(FAMILIES[family], [thought, inside, [assistant("391.", "Hm.")]])
            assert row["merged"] and len(row["response_ids"]) == 2, "the same tokens are one response"
    _, row = tokenize(LLAMA3, [thought, "391."])
    assert row["dropped"] == RNR and "the reasoning (reasoning_content) of response 1" in row["detail"]
    _, row = tokenize(QWEN3, with_other(TRAJECTORIES["reasoned, user in between"]))
    assert "the reasoning of turn 1 of response 1 once other turns follow; score_tokens: last" in row["detail"]


def test_no_space_and_no_other_context_with_tokenizers_that_put_spaces():
    vicuna = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ ' ASSISTANT:' + m.content + eos_token }}"
        "{% else %}{{ 'USER: ' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )
    turns = TRAJECTORIES["user in between"]
    for kind in ("always", "first", "legacy"):
        tokenize_row, row = tokenize(spaced_tokenizer(kind, vicuna), with_other(turns))
        assert row["dropped"] == "", row["detail"]
        check_as_sampled(tokenize_row, row, 0, turns)


JOINS_ARGUMENTS = QWEN3.replace("(call.function.arguments | tojson) + '}", "call.function.arguments + '}")
PRINTS_ARGUMENTS = QWEN3.replace("{{- (call.function.arguments | tojson) + '}", "{{- call.function.arguments }}{{ '}")
READS_PARTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NEEDS_TOOLS = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + QWEN3


@pytest.mark.parametrize("template", [JOINS_ARGUMENTS, PRINTS_ARGUMENTS, NEEDS_TOOLS])
def test_arguments_are_json_also_where_a_template_expects_them_as_text(template):
    assert template.removeprefix(NEEDS_TOOLS.removesuffix(QWEN3)) != QWEN3 or template == NEEDS_TOOLS
    responses = with_other(TRAJECTORIES["call, user, call"])
    tokenize_row, row = tokenize(template, responses, TOOLS)
    check_as_sampled(tokenize_row, row, 0, responses[0], TOOLS)
    _, expected = tokenize(QWEN3, responses, TOOLS)
    assert row == expected


def test_contents_that_are_parts_are_read_where_the_template_reads_them():
    part = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}  # noqa: E731
    turns = [part("assistant", "Which one?"), part("user", "The first."), part("assistant", "It is <|im_end|>391.")]
    prompt = [part("user", "What is 17 times 23?")]
    tokenize_row, row = tokenize(READS_PARTS, [turns, [part("assistant", "No idea.")]], prompt=prompt)
    assert row["dropped"] == "", row["detail"]
    assert counted_texts(tokenize_row.tokenizer, row) == ["Which one?<|im_end|>", "It is <|im_end|>391.<|im_end|>"]
    assert row["response_ids"][0].count(tokenize_row.tokenizer.eos_token_id) == 3
    _, row = tokenize(QWEN3, [turns, "No idea."], prompt=prompt)
    assert row["dropped"] != ""
