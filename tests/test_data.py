"""Rows of every known format, from files and folders, and the errors that bad ones get."""

import gzip
import json
import math

import pytest
from datasets import Dataset, DatasetDict

from alignment.data import DataConfig, check_rows, load_groups
from alignment.errors import UserError
from alignment.formats import to_group, to_pair
from tests.conftest import SHARED, needs_shared

USER = [{"role": "user", "content": "Capital of France?"}]
ROW = {"prompt": "Capital of France?", "responses": ["Rome", "Paris", "Oslo"], "scores": [0.1, 0.9, 0.2]}


def said(text):
    return [{"role": "assistant", "content": text}]


def write_jsonl(path, rows):
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def load(path, pairs=False):
    return load_groups(DataConfig(train_file=path), pairs)["train"]


GROUP = {"prompt": USER, "responses": ["Rome", "Paris", "Oslo"], "scores": [0.1, 0.9, 0.2]}
PAIR = {"prompt": USER, "responses": ["Paris", "Rome"], "scores": [0.9, 0.1]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, GROUP),
        (ROW | {"prompt": USER}, GROUP),
        ({"prompt": USER, "responses": [said("Rome"), said("Paris"), said("Oslo")], "rewards": [0.1, 0.9, 0.2]}, GROUP),
        ({"responses": [USER + said(c) for c in ("Rome", "Paris", "Oslo")], "scores": [0.1, 0.9, 0.2]}, GROUP),
        (
            {"A0": USER + said("Rome"), "score_A0": 0.1, "A1": USER + said("Paris"), "score_A1": 0.9,
             "A2": USER + said("Oslo"), "score_A2": 0.2, "A3": None, "score_A3": None, "prompt": "ignored, A0 has it"},
            GROUP,
        ),
        ({"prompt": "Capital of France?", "A0": "Rome", "score_A0": 0.1, "A1": "Paris", "score_A1": 0.9,
          "A2": "Oslo", "score_A2": 0.2}, GROUP),
        ({"chosen": USER + said("Paris"), "rejected": USER + said("Rome"), "score_chosen": 0.9, "score_rejected": 0.1},
         PAIR),
        ({"prompt": USER, "chosen": said("Paris"), "rejected": said("Rome"), "score_chosen": 0.9,
          "score_rejected": 0.1}, PAIR),
    ],
)  # fmt: skip
def test_formats(row, expected):
    assert to_group(row, "here") == expected


def test_more_than_ten_numbered_responses_keep_their_order():
    row = {"prompt": "p"}
    for k in range(12):
        row |= {f"A{k}": str(k), f"score_A{k}": k}
    assert to_group(row, "here")["responses"] == [str(k) for k in range(12)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome"},
        {"chosen": USER + said("Paris"), "rejected": USER + said("Rome"), "score_chosen": 1.0, "score_rejected": 5.0},
        {"prompt": USER, "responses": ["Rome", "Paris"], "scores": [-3, 2]},
    ],
)
def test_pairs_have_the_better_one_first(row):
    assert to_pair(to_group(row, "here", pairs=True), "here") == PAIR | {"scores": [1.0, 0.0]}


def test_pairs_are_made_of_more_responses_when_asked():
    with pytest.raises(UserError, match="set make_pairs to best_worst or best_random"):
        to_pair(GROUP, "here")
    assert to_pair(GROUP, "here", "best_worst")["responses"] == ["Paris", "Rome"]
    drawn = [to_pair(GROUP | {"responses": ["Rome", "Paris", f"Oslo {i}"]}, "here", "best_random") for i in range(20)]
    assert all(pair["responses"][0] == "Paris" for pair in drawn)
    assert {pair["responses"][1][:4] for pair in drawn} == {"Rome", "Oslo"}
    assert to_pair(GROUP, "here", "best_random") == to_pair(GROUP, "here", "best_random")


def test_multi_turn_pairs_keep_every_turn_of_the_prompt():
    turns = [
        {"role": "system", "content": "Be brief"},
        *USER,
        *said("Paris"),
        {"role": "user", "content": "And Italy?"},
    ]
    group = to_group({"chosen": turns + said("Rome"), "rejected": turns + said("Oslo")}, "here", pairs=True)
    assert group["prompt"] == turns
    assert group["responses"] == ["Rome", "Oslo"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_files(tmp_path, name):
    path, rows = tmp_path / name, [ROW, ROW | {"responses": ["a", "b"], "scores": [1, 2]}]
    if name == "rows.json":
        path.write_text(json.dumps(rows))
    elif name == "rows.parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    assert load(str(path))[:] == {
        "prompt": [USER, USER],
        "responses": [ROW["responses"], ["a", "b"]],
        "scores": [ROW["scores"], [1.0, 2.0]],
    }


def test_csv_pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nCapital of France?,Paris,Rome\n")
    assert load(str(path), pairs=True)[0] == PAIR | {"scores": [1.0, 0.0]}


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert len(load(write_jsonl(path, [ROW]))) == 1
    assert len(load(write_jsonl(path, [ROW, ROW]))) == 2


def test_mixer_takes_fractions_of_train_and_whole_eval_splits(tmp_path):
    folder, file = tmp_path / "saved", tmp_path / "rows.jsonl"
    ten = Dataset.from_list([ROW] * 10)
    DatasetDict({"train_prefs": ten, "test_prefs": ten}).save_to_disk(folder)
    write_jsonl(file, [ROW] * 4)
    config = DataConfig(dataset_mixer={str(folder): 0.3, str(file): 0.5}, dataset_splits=["train_prefs", "test_prefs"])
    rows = load_groups(config)
    assert (len(rows["train"]), len(rows["eval"])) == (3 + 2, 10)


def test_folder_of_files_named_by_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ROW] * 3)
    write_jsonl(tmp_path / "test.jsonl", [ROW] * 2)
    rows = load_groups(DataConfig(dataset_mixer={str(tmp_path): 1.0}))
    assert (len(rows["train"]), len(rows["eval"])) == (3, 2)


def test_handbook_2025_mixture(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW] * 10)
    mixture = {"datasets": [{"id": path, "split": "train", "weight": 0.8}], "test_split_size": 2, "seed": 0}
    rows = load_groups(DataConfig(dataset_mixture=mixture))
    assert (len(rows["train"]), len(rows["eval"])) == (6, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "answers": ["a"]}, r"line 2: needs columns prompt, responses.*found prompt, answers"),
        (ROW | {"responses": ["a"], "scores": [1]}, "line 2: 1 response; at least two"),
        (ROW | {"scores": [1, None, 2]}, "line 2: the score of response 2 is null"),
        (ROW | {"scores": [1, math.nan, 2]}, "line 2: the score of response 2 is nan"),
        (ROW | {"scores": [1, 2, math.inf]}, "line 2: the score of response 3 is inf"),
        (ROW | {"scores": ["7", 1, 2]}, "line 2: the score of response 1 is '7'"),
        (ROW | {"scores": [1, 2]}, "line 2: responses and scores must be lists of the same length"),
        (ROW | {"prompt": None}, "line 2: no prompt"),
        (ROW | {"responses": ["a", None, "b"]}, "line 2: response 2 must be text or a list of messages"),
        (ROW | {"responses": ["a", USER, "b"]}, "line 2: response 2 does not end with an assistant message"),
        ("{'prompt': 'x'}", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected an object"),
        (ROW | {"responses": ["a", "\ud800", "b"]}, "line 2: holds half of a surrogate pair"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load(write_jsonl(tmp_path / "rows.jsonl", [ROW, row]))


def test_responses_of_different_prompts_are_refused():
    other = [{"role": "user", "content": "Capital of Italy?"}]
    with pytest.raises(UserError, match="do not share one prompt"):
        to_group({"chosen": USER + said("Paris"), "rejected": other + said("Rome")}, "here", pairs=True)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load("nowhere.jsonl")
    with pytest.raises(UserError, match="no rows"):
        load(write_jsonl(tmp_path / "empty.jsonl", []))
    (tmp_path / "torn.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="torn.jsonl.gz: cannot be read"):
        load(str(tmp_path / "torn.jsonl.gz"))
    with pytest.raises(UserError, match="no train split"):
        load_groups(DataConfig(dataset_mixer={"x": 1.0}, dataset_splits=["test"]))
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        load_groups(DataConfig(dataset_mixer={"x": 2}))
    with pytest.raises(UserError, match="some/unknown-set: cannot be loaded"):
        load_groups(DataConfig(dataset_mixer={"some/unknown-set": 1.0}))
    DatasetDict({"training": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'train'; it has training"):
        load_groups(DataConfig(dataset_mixer={str(tmp_path / "saved"): 1.0}))


def test_rows_must_fit_loss_and_tokenizer():
    rows = Dataset.from_list([PAIR, GROUP])
    check_rows(rows, only_pairs=False, template=None)
    with pytest.raises(UserError, match="row 2 has 3"):
        check_rows(rows, only_pairs=True, template=None)
    turns = Dataset.from_list([PAIR | {"prompt": USER * 3}])
    check_rows(turns, only_pairs=True, template="x")
    with pytest.raises(UserError, match="chat_template: the tokenizer has none"):
        check_rows(turns, only_pairs=True, template=None)


@needs_shared
@pytest.mark.parametrize(
    ("name", "pairs", "ks"),
    [
        ("alpacaeval_reward_eval", False, range(4, 9)),
        ("alpacaeval_ragged_eval", False, range(2, 9)),
        ("alpacaeval_short_eval", False, {4}),
        ("vicuna80_reward_eval", False, range(10, 40)),
        ("ultrafeedback_format_eval", False, {4}),
        ("pairwise_eval", False, {2}),
        ("pairwise_eval", True, {2}),
    ],
)
def test_shared_files(name, pairs, ks):
    rows = load(str(SHARED / "data" / f"{name}.jsonl.gz"), pairs)
    assert {len(scores) for scores in rows["scores"]} <= set(ks)
    assert all(prompt[-1]["role"] == "user" for prompt in rows["prompt"])
