"""Rows of every known form, from files and folders, how they are mixed and split, and what became of each."""

import gzip
import json
import random

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.data import reading, records, sources
from alignment.data.groups import GroupReader, RowConfig
from alignment.data.load import DataConfig, check_num_responses, load_groups
from alignment.data.outcomes import check_template
from alignment.data.reading import load_source
from alignment.data.row import BadRow
from alignment.errors import UserError
from tests.conftest import SHARED, needs_shared
from tests.rows import GROUP, LONG, PAIR, ROW, ULTRAFEEDBACK, USER, numbered, said, write_jsonl
from trl_nca.loss_config import LossConfig


def load(path, pairs=False, **settings):
    """Kept rows of a file, without what is noted beside them."""
    kept = load_groups(DataConfig(train_file=path, **settings), pairs)[0]["train"]
    return kept.select_columns(["prompt", "responses", "scores"])


def counts(path, **settings):
    return load_groups(DataConfig(train_file=path, max_dropped_fraction=1, **settings))[1]["train"]


def read(row, pairs=False, **settings):
    """The groups that a row becomes."""
    groups = GroupReader(RowConfig(**settings), pairs)(row)
    return [{"prompt": g.prompt, "responses": g.responses, "scores": g.scores} for g in groups]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, GROUP),
        (ROW | {"prompt": USER}, GROUP),
        ({"prompt": USER, "responses": [said("Rome"), said("Paris"), said("Oslo")], "rewards": [0.1, 0.9, 0.2]}, GROUP),
        ({"responses": [USER + said(c) for c in ("Rome", "Paris", "Oslo")], "scores": [0.1, 0.9, 0.2]}, GROUP),
        (
            {"A0": USER + said("Rome"), "score_A0": 0.1, "A1": USER + said("Paris"), "score_A1": 0.9,
             "A2": USER + said("Oslo"), "score_A2": 0.2, "A3": None, "score_A3": None, "prompt": "Capital of France? "},
            GROUP,
        ),
        ({"prompt": "Capital of France?", "A0": "Rome", "score_A0": 0.1, "A1": "Paris", "score_A1": 0.9,
          "A2": "Oslo", "score_A2": 0.2}, GROUP),
        ({"chosen": USER + said("Paris"), "rejected": USER + said("Rome"), "score_chosen": 0.9, "score_rejected": 0.1},
         PAIR),
        ({"prompt": USER, "chosen": said("Paris"), "rejected": said("Rome"), "score_chosen": 0.9,
          "score_rejected": 0.1}, PAIR),
        (ULTRAFEEDBACK, GROUP),
    ],
)  # fmt: skip
def test_forms(row, expected):
    assert read(row) == [expected]


def test_more_than_ten_numbered_responses_keep_their_order():
    row = {"prompt": "p"}
    for k in range(12):
        row |= {f"A{k}": str(k), f"score_A{k}": k}
    assert read(row)[0]["responses"] == [str(k) for k in range(12)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome"},
        {"chosen": USER + said("Paris"), "rejected": USER + said("Rome"), "score_chosen": 1.0, "score_rejected": 5.0},
        {"prompt": USER, "responses": ["Rome", "Paris"], "scores": [-3, 2]},
    ],
)
def test_pairs_have_the_better_one_first(row):
    assert read(row, pairs=True) == [PAIR | {"scores": [1.0, 0.0]}]


def test_a_pair_of_actions_in_a_reasoning_tree():
    """UltraInteract's rows: turns with the environment's answers, and two actions that may come next."""
    said_then = [
        {"from": "user", "value": "Simplify (-3-2i)-(1+4i)."},
        {"from": "assistant", "value": "-3 + 1"},
        {"from": "user", "value": "Out: -2. Your answer is wrong."},
    ]
    row = {"id": "d1_2_1", "parent_id": "d1", "task": "Math_PoT", "dataset": "MATH", "chosen": "-4", "rejected": "-2"}
    (group,) = read(row | {"trajectory": said_then}, pairs=True)
    assert [m["role"] for m in group["prompt"]] == ["user", "assistant", "user"]
    assert [m["content"] for m in group["prompt"]] == [turn["value"] for turn in said_then]
    assert (group["responses"], group["scores"]) == (["-4", "-2"], [1.0, 0.0])
    sharegpt = [turn | {"from": {"user": "human", "assistant": "gpt"}[turn["from"]]} for turn in said_then]
    assert read(row | {"trajectory": sharegpt}, pairs=True) == [group]
    with pytest.raises(BadRow, match="bad_messages"):
        read(row | {"trajectory": [{"from": "user"}]}, pairs=True)
    with pytest.raises(BadRow, match="no_prompt"):
        read(row | {"trajectory": []}, pairs=True)


def test_the_unit_of_the_scores_is_no_matter_of_pairs_without_any():
    pair = {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome"}
    settings_ = {"score_range": [1, 10], "tie_margin": 1.5}
    assert read(pair, pairs=True, **settings_) == [PAIR | {"scores": [1.0, 0.0]}]
    with pytest.raises(BadRow, match="too_few_responses"):
        read(pair | {"score_chosen": 4, "score_rejected": 0}, **settings_)
    with pytest.raises(BadRow, match="identical_scores"):
        read(pair | {"score_chosen": 4, "score_rejected": 3}, **settings_)


def test_pairs_are_made_of_more_responses_when_asked():
    with pytest.raises(UserError, match="set make_pairs to best_worst, best_random or all"):
        read(ROW, pairs=True)
    assert read(ROW, pairs=True, make_pairs="best_worst") == [PAIR | {"scores": [1.0, 0.0]}]
    assert read(ROW, make_pairs="best_worst") == [PAIR]
    pairs = [pair["responses"] for pair in read(ROW, make_pairs="all")]
    assert pairs == [["Paris", "Oslo"], ["Paris", "Rome"], ["Oslo", "Rome"]]
    assert len(read(ROW, make_pairs="all", tie_margin=0.15)) == 2  # Oslo and Rome are 0.1 apart


def test_random_pairs_are_drawn_by_row_and_seed():
    rows = [ROW | {"responses": ["Rome", "Paris", f"Oslo {i}"]} for i in range(20)]
    draw = lambda seed: [read(row, make_pairs="best_random", draw_seed=seed)[0]["responses"] for row in rows]  # noqa: E731
    first = draw(0)
    assert {pair[0] for pair in first} == {"Paris"}
    assert {pair[1][:4] for pair in first} == {"Rome", "Oslo"}
    assert draw(0) == first != draw(1)


def test_multi_turn_pairs_keep_every_turn_of_the_prompt():
    turns = [
        {"role": "system", "content": "Be brief"},
        *USER,
        *said("Paris"),
        {"role": "user", "content": "And Italy?"},
    ]
    row = {"chosen": turns + said("Rome"), "rejected": turns + said("Oslo")}
    assert read(row, pairs=True) == [{"prompt": turns, "responses": ["Rome", "Oslo"], "scores": [1.0, 0.0]}]


@pytest.mark.parametrize(
    ("how", "taken"), [("top", [7, 9, 8]), ("bottom", [1, 0, 2]), ("spread", [9, 5, 0]), ("random", None)]
)
def test_so_many_responses_of_a_row(how, taken):
    scores = [4, 7, 1, 9, 5, 0, 3, 8, 2, 6]
    row = {"prompt": "p", "responses": [f"response {s}" for s in scores], "scores": scores}
    (group,) = read(row, num_responses=3, choose_responses=how)
    assert group["responses"] == [f"response {s:g}" for s in group["scores"]]
    if taken is None:
        assert len(set(group["scores"])) == 3
        assert [group] == read(row, num_responses=3, choose_responses=how)
        assert [group] != read(row, num_responses=3, choose_responses=how, draw_seed=5)
    else:
        assert group["scores"] == taken
    assert len(read(row, num_responses=20)[0]["responses"]) == 10


def test_scaled_scores():
    assert read(ROW | {"scores": [2, 6, 4]}, scale_scores="minmax")[0]["scores"] == [0.0, 1.0, 0.5]
    assert read(ROW | {"scores": [2, 6, 4]}, scale_scores="zscore")[0]["scores"] == pytest.approx(
        [-1.2247, 1.2247, 0], abs=1e-4
    )
    # Pairs are made by the scores as read, and have the scaled ones.
    pair = read(ROW | {"scores": [2, 6, 4]}, scale_scores="minmax", make_pairs="best_worst", tie_margin=1)
    assert pair[0]["scores"] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet"])
def test_files(tmp_path, name):
    path, rows = tmp_path / name, [ROW, ROW | {"responses": ["a", "b"], "scores": [1, 2]}]
    if name == "rows.json":
        path.write_text(json.dumps(rows))
    elif name == "rows.json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif name == "rows.parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    assert load(str(path))[:] == {
        "prompt": [USER, USER],
        "responses": [ROW["responses"], ["a", "b"]],
        "scores": [ROW["scores"], [1.0, 2.0]],
    }


def test_rows_of_one_response_are_gathered(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "long.jsonl", [*LONG, "{torn", {"prompt": "p", "responses": []}])
    italy = {"prompt": [{"role": "user", "content": "Capital of Italy?"}], "responses": ["Rome", "Oslo"]}
    expected = [GROUP, italy | {"scores": [5.0, 1.0]}]
    assert list(load(path, max_dropped_fraction=0.5)) == expected
    found = counts(path)
    assert (found["lines_in"], found["rows_in"]) == (7, 4)
    assert found["dropped_by_reason"] == {"not_json": 1, "unknown_format": 1}
    without_id = [{k: v for k, v in row.items() if k != "prompt_id"} | {"prompt": "q"} for row in LONG]
    (group,) = load(write_jsonl(tmp_path / "one.jsonl", without_id), row_rules={"duplicate_response": "keep"})
    assert group["responses"] == ["Rome", "Rome", "Paris", "Oslo", "Oslo"]
    two = [LONG[0], LONG[2] | {"prompt": "Another?"}, LONG[4]]
    assert counts(write_jsonl(tmp_path / "two.jsonl", [*two, *LONG[1::2]]))["dropped_by_reason"] == {
        "prompts_differ": 1
    }
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    monkeypatch.setattr(records, "_PIECE_GROUPS", 1)
    assert list(load(path, max_dropped_fraction=0.5)) == expected


def test_unpaired_rows_are_gathered_where_both_labels_occur(tmp_path):
    rows = [
        {"prompt": USER, "completion": said("Rome"), "label": False},
        {"prompt": USER, "completion": said("Paris"), "label": True},
        {"prompt": "Only good ones", "completion": "a", "label": True},
        {"prompt": "Only good ones", "completion": "b", "label": True},
    ]
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    assert list(load(path, max_dropped_fraction=1)) == [PAIR | {"responses": ["Rome", "Paris"], "scores": [0.0, 1.0]}]
    assert counts(path)["dropped_by_reason"] == {"identical_scores": 1}


def test_csv(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nCapital of France?,Paris,Rome\n")
    assert load(str(path), pairs=True)[0] == PAIR | {"scores": [1.0, 0.0]}
    lists = tmp_path / "lists.csv"
    lists.write_text('\ufeffprompt,responses,scores\nCapital of France?,"[""Paris"", ""Rome""]","[0.9, 0.1]"\n')
    assert load(str(lists))[0] == PAIR
    long = tmp_path / "long.csv"
    long.write_text(
        "prompt,response,score,note\nCapital of France?,Paris,0.9,\nCapital of France?,Rome,0.1,\n"
        'Capital of France?,"Lyon,\nI think",N/A,said in two lines\nCapital of France?,Nice,,\n'
    )
    assert load(str(long))[0] == PAIR
    assert counts(str(long))["fixed_by_reason"] == {"unreadable_score": 1, "missing_score": 1}
    labels = tmp_path / "labels.csv"
    labels.write_text("prompt,completion,label\nq,Paris,True\nq,Rome,false\nq,torn,False,cell\nr,a,1\nr,b,0\n")
    assert [row["scores"] for row in load(str(labels), max_dropped_fraction=0.5)] == [[1.0, 0.0], [1.0, 0.0]]


def test_rows_wrapped_by_the_hubs_viewer(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"row_idx": 0, "row": ROW, "truncated_cells": []}])
    assert load(path)[0] == GROUP


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert len(load(write_jsonl(path, [ROW]))) == 1
    assert len(load(write_jsonl(path, [ROW, numbered(1)]))) == 2
    assert len(load(str(path), row_rules={"duplicate_response": "keep"})) == 2
    monkeypatch.setattr(reading, "_outcome", None)
    assert len(load(str(path))) == 2


def test_a_killed_read_goes_on_with_the_pieces_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    rows = [numbered(i, scores=[i, 1, 2]) for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    pieces = sources.open_source(path)
    assert len(pieces) > 3
    read, seen = reading.read_piece, []

    def killed(piece, text_columns):
        if piece.start >= pieces[2].start:
            raise KeyboardInterrupt
        return read(piece, text_columns)

    def noted(piece, text_columns):
        seen.append(piece.start)
        return read(piece, text_columns)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reading, "read_piece", killed)
        load_source(path, config=RowConfig(), num_proc=1)
    monkeypatch.setattr(reading, "read_piece", noted)
    assert load_source(path, config=RowConfig(), num_proc=1)["location"][39] == f"{path}, line 40"
    assert seen == [0, *(piece.start for piece in pieces[2:])]  # the first piece, to see of which form the rows are


def test_several_processes_read_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 2000)
    path = write_jsonl(tmp_path / "rows.jsonl", ["{torn", *(numbered(i) for i in range(100))])
    assert len(sources.open_source(path)) > 3
    rows = load_source(path, config=RowConfig(), num_proc=2)
    assert rows["location"][:] == [f"{path}, line {i + 1}" for i in range(101)]
    assert [p[0]["content"] for p in rows["prompt"][1:]] == [f"Question {i}" for i in range(100)]


def test_mixer_takes_fractions_of_train_and_whole_eval_splits(tmp_path):
    folder, file = tmp_path / "saved", tmp_path / "rows.jsonl"
    train, test = (Dataset.from_list([numbered(i) for i in ids]) for ids in (range(10), range(50, 60)))
    DatasetDict({"train_prefs": train, "test_prefs": test}).save_to_disk(folder)
    write_jsonl(file, [numbered(i) for i in range(20, 24)])
    config = DataConfig(dataset_mixer={str(folder): 0.3, str(file): 0.5}, dataset_splits=["train_prefs", "test_prefs"])
    rows, _ = load_groups(config)
    assert (len(rows["train"]), len(rows["eval"])) == (3 + 2, 10)


def test_folder_of_files_named_by_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [numbered(i) for i in range(3)])
    write_jsonl(tmp_path / "test.jsonl", [numbered(i) for i in range(8, 10)])
    rows, _ = load_groups(DataConfig(dataset_mixer={str(tmp_path): 1.0}))
    assert (len(rows["train"]), len(rows["eval"])) == (3, 2)


def test_handbook_2025_mixture(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [numbered(i) for i in range(10)])
    mixture = {"datasets": [{"id": path, "split": "train", "weight": 0.8}], "test_split_size": 2, "seed": 0}
    rows, _ = load_groups(DataConfig(dataset_mixture=mixture))
    assert (len(rows["train"]), len(rows["eval"])) == (6, 2)


def test_eval_fraction_keeps_rows_of_a_prompt_together(tmp_path):
    rng = random.Random(0)
    rows = [numbered(i % 100, scores=[rng.random() for _ in range(3)]) for i in range(300)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    parts, found = load_groups(DataConfig(train_file=path, eval_fraction=0.2))
    prompts = {name: {p[0]["content"] for p in part["prompt"]} for name, part in parts.items()}
    assert not prompts["train"] & prompts["eval"]
    assert len(prompts["train"] | prompts["eval"]) == 100
    assert 10 < len(prompts["eval"]) < 30
    assert found["train"]["rows_in"] + found["eval"]["rows_in"] == 300
    assert found["train"]["repeated_prompts"] == 2 * len(prompts["train"])
    # More rows do not move a prompt to the other side.
    more = write_jsonl(tmp_path / "more.jsonl", [*rows, *(numbered(i) for i in range(100, 150))])
    held_out = load_groups(DataConfig(train_file=more, eval_fraction=0.2))[0]["eval"]
    assert prompts["eval"] <= {p[0]["content"] for p in held_out["prompt"]}
    with pytest.raises(UserError, match="eval_fraction: leaves all rows to train on"):
        load_groups(DataConfig(train_file=path, eval_fraction=1e-9))


@pytest.mark.parametrize("split", ["eval_file", "dataset_mixer", "eval_fraction", "test_split_size"])
def test_held_out_rows_keep_all_their_responses(tmp_path, split):
    rng = random.Random(0)
    rows = [numbered(i % 40, responses=[f"a{k}" for k in range(5)], scores=[rng.random() for _ in range(5)])
            for i in range(80)]  # fmt: skip
    train, path = write_jsonl(tmp_path / "train.jsonl", rows[:30]), write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = write_jsonl(tmp_path / "test.jsonl", rows[30:40])
    sources = {
        "eval_file": {"train_file": train, "eval_file": held_out},
        "dataset_mixer": {"dataset_mixer": {str(tmp_path): 1.0}},
        "eval_fraction": {"train_file": path, "eval_fraction": 0.3},
        "test_split_size": {"dataset_mixture": {"datasets": [{"id": path}], "test_split_size": 0.3}},
    }[split]
    whole, cut = (load_groups(DataConfig(**sources, **few))[0] for few in ({}, {"num_responses": 2}))
    assert {len(scores) for scores in cut["train"]["scores"]} == {2}
    assert {len(scores) for scores in whole["train"]["scores"]} == {5}
    assert cut["eval"].to_list() == whole["eval"].to_list()
    assert cut["train"]["prompt"][:] == whole["train"]["prompt"][:]
    pairs = load_groups(
        DataConfig(**sources, num_responses=3, choose_responses="bottom", make_pairs="best_worst"), True
    )
    assert [row["responses"] for row in pairs[0]["eval"].to_list()] == [
        [row["responses"][row["scores"].index(pick(row["scores"]))] for pick in (max, min)]
        for row in whole["eval"].to_list()
    ]
    # Where it is what makes the pairs, it makes them of held-out rows too: these could not be read otherwise.
    for settings_ in ({"pairs": True}, {"only_pairs": True}):
        found = load_groups(DataConfig(**sources, num_responses=2), **settings_)[0]
        assert {len(scores) for part in found.values() for scores in part["scores"]} == {2}


def test_prompts_on_both_sides_end_the_run(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [numbered(i) for i in range(5)])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [numbered(i) for i in range(4, 9)])
    with pytest.raises(UserError, match=r"1 prompts stand in.*eval.jsonl, line 1.*allow_shared_prompts"):
        load_groups(DataConfig(train_file=train, eval_file=held_out))
    _, found = load_groups(DataConfig(train_file=train, eval_file=held_out, allow_shared_prompts=True))
    assert found["train"]["prompts_shared_with_eval"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "answers": ["a"]},
            r"line 2: its columns are prompt, answers; say which .* columns: {prompt: prompt, responses: answers,",
        ),
        (ROW | {"responses": ["a"], "scores": [1]}, "line 2: 1 usable response"),
        (ROW | {"scores": [1, 2]}, "line 2: responses and scores are not lists of the same length"),
        (ROW | {"prompt": None}, "line 2: no prompt"),
        (ROW | {"responses": ["a", 7, "b"]}, "line 2: response 2 is neither text nor messages"),
        (ROW | {"responses": ["a", USER, "b"]}, "line 2: response 2 has no turn of the assistant's"),
        ("{'prompt': 'x'}", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected an object"),
    ],
)
def test_too_many_bad_rows_end_the_run_and_are_named(tmp_path, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW, row])
    with pytest.raises(UserError, match=f"1 of 2 rows had to be dropped.*{message}"):
        load(path)
    assert len(load(path, max_dropped_fraction=0.5)) == 1
    found = counts(path)
    assert (found["rows_in"], found["rows_dropped"]) == (2, 1)


def test_bytes_that_are_not_utf8_cost_their_row(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "caf\xe9", "responses": ["a", "b"], "scores": [1, 2]}\n')
    assert counts(str(path))["dropped_by_reason"] == {"broken_text": 1}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))
        | st.sampled_from([json.dumps(ROW).encode(), b"{}", b"[1]", b"null", b'{"prompt": 1}', b"[" * 5000]),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_whatever_stands_in_a_file_is_counted(tmp_path, lines):
    path = tmp_path / "rows.jsonl"
    content = b"\n".join([*lines, json.dumps(numbered(0)).encode()])
    path.write_bytes(content)
    found = counts(str(path))
    written = content.decode("utf-8-sig", "surrogateescape").split("\n")
    assert found["rows_in"] == sum(bool(line.strip()) for line in written)
    assert found["rows_in"] - found["rows_dropped"] == 1 + lines.count(json.dumps(ROW).encode())


def test_a_row_whose_action_is_fail_ends_the_run(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [numbered(i) for i in range(50)] + [ROW | {"scores": [1, "2", 3]}])
    assert len(load(path)) == 51
    with pytest.raises(UserError, match=r"line 51: text_score: the score of response 2 is '2'.*row_rules: text_score"):
        load(path, row_rules={"text_score": "fail"})


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load("nowhere.jsonl")
    with pytest.raises(UserError, match="no rows"):
        load(write_jsonl(tmp_path / "empty.jsonl", []))
    (tmp_path / "torn.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="torn.jsonl.gz: cannot be read"):
        load(str(tmp_path / "torn.jsonl.gz"))
    (tmp_path / "torn.json").write_text("[1, 2")
    with pytest.raises(UserError, match="torn.json: cannot be read"):
        load(str(tmp_path / "torn.json"))
    with pytest.raises(UserError, match="no train split"):
        load_groups(DataConfig(dataset_mixer={"x": 1.0}, dataset_splits=["test"]))
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        load_groups(DataConfig(dataset_mixer={"x": 2}))
    with pytest.raises(UserError, match="some/unknown-set: cannot be loaded"):
        load_groups(DataConfig(dataset_mixer={"some/unknown-set": 1.0}))
    DatasetDict({"training": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'train'; it has training"):
        load_groups(DataConfig(dataset_mixer={str(tmp_path / "saved"): 1.0}))


def test_rows_must_fit_loss_and_tokenizer(tmp_path):
    rows = load_source(
        write_jsonl(tmp_path / "rows.jsonl", [numbered(i, **PAIR) for i in range(2)] + [ROW]), config=RowConfig()
    )
    check_num_responses(rows, LossConfig(loss_type="PL"))
    with pytest.raises(UserError, match="DPO compares 2 responses, and .*rows.jsonl, line 3 has 3"):
        check_num_responses(rows, LossConfig(loss_type="DPO"))
    turns = load_source(
        write_jsonl(tmp_path / "turns.jsonl", [PAIR | {"prompt": [*USER, *said("?"), *USER]}]), config=RowConfig()
    )
    check_num_responses(turns, LossConfig(loss_type="DPO"))
    check_template(turns, "x")
    check_template(rows, None)
    with pytest.raises(UserError, match="chat_template: the tokenizer has none"):
        check_template(turns, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"row_rules": '{"identical_score": "keep"}'}, "did you mean 'identical_scores'"),
        ({"row_rules": "[1]"}, "row_rules: not a mapping"),
        ({"score_range": [1, 0]}, "score_range"),
        ({"min_responses": 1}, "min_responses: must be at least 2"),
        ({"num_responses": 3, "min_responses": 4}, "num_responses: 3 is less"),
        ({"score": "kindness"}, "score: 'kindness'; choose overall"),
        ({"score": "honesty=-1"}, "weights above 0"),
        ({"eval_fraction": 1.5}, "eval_fraction"),
        ({"max_dropped_fraction": 2}, "max_dropped_fraction"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises((ValueError, UserError), match=message):
        DataConfig(train_file="x.jsonl", **setting)


MIXER = {"dataset_mixer": {"a/b": 1.0}}
MIXTURE = {"dataset_mixture": {"datasets": [{"id": "a/b"}], "test_split_size": 5}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no training data; set train_file, dataset_mixer or dataset_mixture"),
        (
            MIXER | {"train_file": "t.jsonl"},
            "train_file: dataset_mixer names training data too; give one of",
        ),
        (MIXER | MIXTURE, "dataset_mixer: dataset_mixture names training data too"),
        (MIXER | {"eval_file": "e.jsonl"}, "eval_file: is read with train_file alone, and .* is in dataset_mixer"),
        (MIXTURE | {"eval_file": "e.jsonl"}, "eval_file: is read with train_file alone, and .* is in dataset_mixture"),
        (
            {"train_file": "t.jsonl", "eval_file": "e.jsonl", "eval_fraction": 0.1},
            "eval_file: eval_fraction names",
        ),
        (
            MIXER | {"eval_fraction": 0.1, "dataset_splits": ["train", "test"]},
            "eval_fraction: dataset_splits names",
        ),
        (MIXTURE | {"eval_fraction": 0.1}, "eval_fraction: test_split_size names held-out rows too"),
        ({"train_file": "t.jsonl", "dataset_splits": ["train"]}, "dataset_splits: is read with dataset_mixer alone"),
        ({"train_file": "t.jsonl", "dataset_configs": ["x"]}, "dataset_configs: is read with dataset_mixer alone"),
        (MIXER | {"dataset_configs": ["x", "y"]}, "dataset_configs: 2 names for the 1 sources of dataset_mixer"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_eval_fraction_reads_no_test_split(tmp_path):
    """It would be thrown away."""
    parts = {"train": Dataset.from_list([numbered(i) for i in range(40)]), "test": Dataset.from_list([numbered(99)])}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    rows, _ = load_groups(DataConfig(dataset_mixer={str(tmp_path / "both"): 1.0}, eval_fraction=0.3))
    assert len(rows["train"]) + len(rows["eval"]) == 40
    assert len(load_groups(DataConfig(dataset_mixer={str(tmp_path / "both"): 1.0}))[0]["eval"]) == 1


@needs_shared
@pytest.mark.parametrize(
    ("name", "pairs", "ks"),
    [
        ("alpacaeval_reward_eval", False, range(2, 9)),
        ("alpacaeval_ragged_eval", False, range(2, 9)),
        ("alpacaeval_short_eval", False, range(2, 5)),
        ("vicuna80_reward_eval", False, range(10, 40)),
        ("ultrafeedback_format_eval", False, range(2, 5)),
        ("ultrafeedback_layout_vicuna", False, range(2, 9)),
        ("pairwise_eval", False, {2}),
        ("pairwise_eval", True, {2}),
    ],
)
def test_shared_files(name, pairs, ks):
    rows = load(str(SHARED / "data" / f"{name}.jsonl.gz"), pairs)
    assert {len(scores) for scores in rows["scores"]} <= set(ks)
    assert all(prompt[-1]["role"] == "user" for prompt in rows["prompt"])
