"""The column `weight` on its way from a file of any form to the batch: kept, refused, reported."""

import json
import math

import pytest
from datasets import Dataset

from alignment.data.convert import ConvertConfig, convert
from alignment.data.load import DataConfig, load_groups
from alignment.data.prepare import describe_group, prepare_rows
from alignment.data.report import summary
from alignment.errors import UserError
from nca_trainer import NCAConfig, PairwiseNCATrainer
from tests.rows import GROUP, LONG, PAIR, ROW, ULTRAFEEDBACK, numbered, write_jsonl
from tests.tiny import tiny_tokenizer
from tests.trainers import make_trainer, pair_rows, reward_rows
from trl_nca.collate import GroupCollator
from trl_nca.columns import check_weights, with_locations

TWO = {"prompt": "Capital of France?", "chosen": "Paris", "rejected": "Rome"}
NUMBERED = {"prompt": "p", "A0": "a", "score_A0": 1, "A1": "b", "score_A1": 2}


def load(folder, rows, pairs=False, name="rows.jsonl", **settings):
    file = folder / name
    file.write_text(rows) if isinstance(rows, str) else write_jsonl(file, rows)
    return load_groups(DataConfig(train_file=str(file), max_dropped_fraction=0.9, **settings), pairs)


def weights(folder, rows, *args, **settings):
    return load(folder, rows, *args, **settings)[0]["train"]["weight"][:]


def prepare(folder, rows, pairs=False, **settings):
    file = write_jsonl(folder / "rows.jsonl", rows)
    args = NCAConfig(output_dir=str(folder), bf16=False, use_cpu=True)
    return prepare_rows(DataConfig(train_file=file, **settings), args, tiny_tokenizer(), pairs)


@pytest.mark.parametrize("row", [ROW, NUMBERED, ULTRAFEEDBACK, TWO | {"score_chosen": 3, "score_rejected": 1}])
def test_every_form_keeps_it(tmp_path, row):
    assert weights(tmp_path, [row | {"weight": 2}, {"row": row | {"weight": 0.5}}, row]) == [2.0, 0.5, None]
    rows, counts = load(tmp_path, [row | {"weight": 2}])
    assert "weight" not in str(counts["train"]["noted"]), "it is read"
    assert "weight" not in load(tmp_path, [row, row])[0]["train"].column_names


def test_pairs_keep_that_of_their_row(tmp_path):
    assert weights(tmp_path, [TWO | {"weight": 3}, TWO], pairs=True) == [3.0, None]
    rows = [ROW | {"weight": 3}, numbered(1, weight=0.5)]
    assert weights(tmp_path, rows, pairs=True, make_pairs="all") == [3.0] * 3 + [0.5] * 3
    assert weights(tmp_path, rows, num_responses=2, scale_scores="zscore") == [3.0, 0.5]


def test_rows_of_one_prompt_have_one_weight(tmp_path):
    by_prompt = [row | ({"weight": 2} if row["prompt_id"] == 1 and row["prompt"] else {}) for row in LONG]
    assert weights(tmp_path, by_prompt) == [2.0, None], "one of them may say it for all"
    by_prompt[0] |= {"weight": 3}
    _, counts = load(tmp_path, by_prompt)
    (example,) = counts["train"]["examples"]["bad_weight"]
    assert example.endswith("rows.jsonl, line 1: the rows of one prompt have the weights 3 and others")


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, 1e39, True, False, "heavy", "nan", [1], {"a": 1}])
def test_what_is_no_weight_is_a_bad_row_that_is_named(tmp_path, weight):
    rows = [ROW | {"weight": 1}, numbered(1, weight=weight), numbered(2)]
    kept, counts = load(tmp_path, rows)
    assert kept["train"]["weight"][:] == [1.0, None]
    assert counts["train"]["examples"] == {
        "bad_weight": [f"{tmp_path / 'rows.jsonl'}, line 2: the weight is {weight!r}"]
    }
    with pytest.raises(UserError, match="rows.jsonl, line 2: bad_weight: the weight is .*: fix the row"):
        load(tmp_path, rows, row_rules={"bad_weight": "fail"})
    with pytest.raises(UserError, match="bad_weight"):
        load(tmp_path, [{**row, "weight": weight} for row in LONG], row_rules={"bad_weight": "fail"})


def test_tables_and_texts(tmp_path):
    table = "prompt,chosen,rejected,weight\np,a,b,0.5\nq,a,b,\nr,a,b,x\n"
    assert weights(tmp_path, table, pairs=True, name="rows.csv") == [0.5, None]
    table = table.replace("weight", "how much").replace(",", ";").replace("0.5", "0.25")
    columns = {"weight": "how much"}
    assert weights(tmp_path, table, pairs=True, name="rows.csv", columns=columns) == [0.25, None]
    rows = [ROW | {"weight": "0.5"}, numbered(1, weight=" "), numbered(2, weight=2)]
    kept, counts = load(tmp_path, rows)
    assert (kept["train"]["weight"][:], counts["train"]["fixed_by_reason"]) == ([0.5, None, 2.0], {"text_score": 1})
    assert weights(tmp_path, rows, row_rules={"text_score": "drop"}) == [None, 2.0]


def test_from_a_file_to_the_batch_and_the_report(tmp_path):
    rows = [ROW | {"weight": 2}, numbered(1), numbered(2, weight=0), numbered(3, weight=-1)]
    _, tokens, report = prepare(tmp_path, rows, max_dropped_fraction=0.5)
    assert GroupCollator()(list(tokens["train"]))["weight"].tolist() == [2, 1, 0]
    assert report["weights"] == {"mean": 1.0, "min": 0.0, "max": 2.0, "rows_zero": 1, "rows_without": 1}
    assert "mask 0, weight 2):" in describe_group(tokens["train"][0], tiny_tokenizer())
    words = "weights from 0 to 2, mean 1; rows of weight 0: 1; rows without a weight, which have the weight 1: 1"
    assert words in summary("train", report)
    _, tokens, report = prepare(tmp_path, [ROW, numbered(1)])
    assert "weights" not in report
    assert "mask 0):" in describe_group(tokens["train"][0], tiny_tokenizer())
    assert "weight" not in GroupCollator()(list(tokens["train"]))


def test_a_source_without_weights_beside_one_that_has_them(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [numbered(i, **more) for i in range(start, start + 2)])
        for name, start, more in (("plain", 0, {}), ("weighted", 2, {"weight": 3}))
    ]
    kept, _ = load_groups(DataConfig(dataset_mixer=dict.fromkeys(files, 1.0), dataset_splits=["train"]))
    assert kept["train"]["weight"][:] == [None, None, 3.0, 3.0]


def test_weights_that_are_all_zero_end_the_run(tmp_path):
    rows = [numbered(i, weight=0) for i in range(4)]
    with pytest.raises(UserError, match="train: all weights are 0"):
        prepare(tmp_path, rows)
    assert prepare(tmp_path, [*rows, numbered(5)])[2]["weights"]["rows_zero"] == 4


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("to", ["list", "pairs"])
def test_convert_keeps_it(tmp_path, to, name):
    source, output = write_jsonl(tmp_path / "in.jsonl", [ROW | {"weight": 2}, numbered(1)]), tmp_path / name
    report = convert([source], ConvertConfig(to=to, output=str(output)))
    assert report["weights"]["max"] == 2
    read = Dataset.from_parquet(str(output)) if name.endswith("parquet") else map(json.loads, output.open())
    assert [row["weight"] for row in read] == [2, None]
    convert([str(output)], ConvertConfig(to=to, output=str(tmp_path / f"again_{name}")))
    assert (tmp_path / f"again_{name}").read_bytes() == output.read_bytes()


def tokenized(dataset, **columns):
    trainer = make_trainer("unused", dataset)
    rows = trainer.train_dataset.select_columns(["prompt_ids", "response_ids", "scores"])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def test_trainers_take_it_from_rows_and_from_token_ids(tmp_path):
    given = [0.5, 2.0, None, 1.0]
    trainers = [
        make_trainer(tmp_path, reward_rows(4).add_column("weight", given)),
        make_trainer(tmp_path, pair_rows(4).add_column("weight", given), PairwiseNCATrainer),
        make_trainer(tmp_path, tokenized(reward_rows(4), weight=given)),
    ]
    for trainer in trainers:
        (batch,) = trainer.get_train_dataloader()
        assert sorted(batch["weight"].tolist()) == [0.5, 1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, -2.0, 1.0], "train: row 2 of train: the weight is -2 \\(1 such rows\\)"),
        ([1.0, 1.0, math.nan], "row 3 of train: the weight is nan"),
        ([1.0, math.inf, 1e39], "row 2 of train: the weight is inf \\(2 such rows\\)"),
        (["1", "2", "3"], "the column weight holds string; it is to be numbers"),
        ([True, True, False], "the column weight holds bool; it is to be numbers"),
        ([0, 0, 0], "train: all weights are 0"),
    ],
)
def test_trainers_refuse_what_is_no_weight(given, message):
    rows = with_locations(reward_rows(3).add_column("weight", given), "train")
    with pytest.raises(ValueError, match=message):
        check_weights(rows, "train")


def test_trainers_check_it_on_both_ways(tmp_path):
    with pytest.raises(ValueError, match="the weight is -1"):
        make_trainer(tmp_path, reward_rows(2).add_column("weight", [1, -1]))
    with pytest.raises(ValueError, match="the weight is -1"):
        make_trainer(tmp_path, tokenized(reward_rows(2), weight=[1, -1]))


def test_groups_and_pairs_without_a_weight_are_as_before(tmp_path):
    rows, _ = load(tmp_path, [ROW])
    assert {name: rows["train"][0][name] for name in GROUP} == GROUP
    rows, _ = load(tmp_path, [TWO], pairs=True)
    assert {name: rows["train"][0][name] for name in PAIR} == PAIR | {"scores": [1.0, 0.0]}
