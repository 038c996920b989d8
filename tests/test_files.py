"""Files as they are met: endings, encodings, delimiters, values of tables, and rows that Python refuses."""

import datetime
import decimal
import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Json, List, Value, config

from alignment.data.convert import ConvertConfig, convert
from alignment.data.groups import RowConfig
from alignment.data.load import DataConfig, load_groups
from alignment.data.reading import load_source
from alignment.data.row import BadRow
from alignment.data.sources import open_source, read_piece
from alignment.errors import UserError
from tests.rows import GROUP, PAIR, ROW, USER, numbered, write_jsonl

ASKED = "Capital of France?"


def rows_of(path, **settings):
    return [row for piece in open_source(str(path)) for _, row in read_piece(piece, **settings)]


def load(path, **settings):
    kept = load_groups(DataConfig(train_file=str(path), **settings))[0]["train"]
    return list(kept.select_columns(["prompt", "responses", "scores"]))


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.jsonlines", "rows.JSONL", "rows.ndjson.gz", "rows.jsonl.GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_lines_by_ending_and_encoding(tmp_path, name, encoding):
    if encoding == "utf-8" and name == "rows.JSONL":
        encoding = "utf-8-sig"
    rows = [ROW | {"prompt": "Où? 日本"}, ROW]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert rows_of(tmp_path / name) == rows


def test_a_list_in_utf16(tmp_path):
    (tmp_path / "rows.json").write_bytes(json.dumps([ROW, numbered(1)], indent=1).encode("utf-16"))
    assert rows_of(tmp_path / "rows.json") == [ROW, numbered(1)]
    (tmp_path / "torn.jsonl").write_bytes(json.dumps(ROW).encode("utf-16")[:-1])
    with pytest.raises(UserError, match="torn.jsonl: not UTF-8, and not utf-16.* either: convert it to UTF-8"):
        rows_of(tmp_path / "torn.jsonl")


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("rows.csv", ","), ("rows.csv", ";"), ("rows.csv", "|"), ("rows.tsv", "\t"), ("rows.TSV.gz", "\t")],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_text_by_delimiter_and_encoding(tmp_path, name, delimiter, encoding):
    comma = "0.9" if delimiter != ";" else "0,9"
    lines = [["prompt", "response", "score"], [ASKED, "Paris", comma], [ASKED, "Rome", "0.1"]]
    content = "".join(delimiter.join(cells) + "\r\n" for cells in lines).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load(tmp_path / name) == [PAIR]


def test_latin_1_is_named(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,response,score\nUn numéro,sept,0.9\nUn numéro,huit,0.1\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.csv, line 2: bytes that are not UTF-8 .Latin-1 perhaps; `iconv"):
        load(path)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.jsonl.zst", "rows"])
def test_unknown_endings_are_named_with_those_that_are_known(tmp_path, name):
    (tmp_path / name).write_text("PK")
    with pytest.raises(UserError, match=rf"{name}: no file of a known kind; they are .jsonl, .ndjson, .* and .parquet"):
        open_source(str(tmp_path / name))


def test_parquet_is_known_by_its_content(tmp_path):
    Dataset.from_list([ROW]).to_parquet(tmp_path / "rows.pq")
    assert rows_of(tmp_path / "rows.pq") == [ROW]


def test_answers_in_json_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,response,score,meta\n[1],"{""prime"": 7}",1.0,"{""a"": 1}"\n[1],"[3, 2, 1]",0,[2]\n[1],[],null,\n'
    )
    assert [row["meta"] for row in rows_of(path)] == [{"a": 1}, [2], None]  # as a reward function gets it
    (row,) = load(path)
    assert (row["prompt"][0]["content"], row["responses"]) == ("[1]", ['{"prime": 7}', "[3, 2, 1]"])
    path.write_text('ask,reply,mark\nq,"{""prime"": 7}",1.0\nq,"[3, 2, 1]",0\n')
    (row,) = load(path, columns={"prompt": "ask", "response": "reply", "score": "mark"})
    assert (row["responses"], row["scores"]) == (['{"prime": 7}', "[3, 2, 1]"], [1.0, 0.0])


@pytest.mark.parametrize(
    ("responses", "scores"),
    [
        ('["Rome", "Paris", "Oslo"]', "[0.1, 0.9, 0.2]"),
        ("['Rome', 'Paris', 'Oslo']", "[0.1, 0.9, 0.2]"),
        ("['Rome' 'Paris'\n 'Oslo']", "[0.1 0.9 0.2]"),
    ],
    ids=["json", "python", "numpy"],
)
def test_lists_in_cells(tmp_path, responses, scores):
    path = tmp_path / "rows.csv"
    cells = ",".join('"' + cell.replace('"', '""') + '"' for cell in (ASKED, responses, scores))
    path.write_text(f"prompt,responses,scores\n{cells}\n")
    assert load(path) == [GROUP]


@pytest.mark.parametrize("bad", ['{"n": ' + "7" * 5000 + "}", "[" * 100_000 + "]" * 100_000], ids=["digits", "depth"])
def test_a_row_that_python_refuses_costs_itself(tmp_path, bad):
    assert sys.get_int_max_str_digits() < 5000
    lines = [json.dumps(ROW), bad, json.dumps(numbered(1, responses=['"],', "}", "c"]))]
    for name, text in [("rows.jsonl", "\n".join(lines)), ("rows.json", f"[{', '.join(lines)}]")]:
        (tmp_path / name).write_text(text)
        first, refused, last = rows_of(tmp_path / name)
        assert (first, last) == (ROW, json.loads(lines[2]))
        assert isinstance(refused, BadRow)
        assert refused.reason == "not_json"
        counts = load_groups(DataConfig(train_file=str(tmp_path / name), max_dropped_fraction=0.5))[1]["train"]
        assert counts["dropped_by_reason"] == {"not_json": 1}
    # In rows of one response too, where what is read is written down once more.
    record = {"prompt": "p", "response": "a", "score": 1}
    nested = json.dumps(record | {"response": "b"})[:-1] + ', "prompt_id": ' + "[" * 900 + "]" * 900 + "}"
    write_jsonl(tmp_path / "long.jsonl", [record, nested, record | {"response": "c", "score": 2}])
    assert len(load_source(str(tmp_path / "long.jsonl"), config=RowConfig())) == 2


def test_values_of_tables(tmp_path):
    when = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    rows = [
        {
            "prompt": ASKED.encode(),
            "responses": [b"Rome", b"Paris", b"Oslo"],
            "scores": [decimal.Decimal("0.1"), decimal.Decimal("0.9"), decimal.Decimal("0.2")],
            "when": when, "day": when.date(), "time": when.time(), "took": datetime.timedelta(seconds=90),
            "raw": b"\xff\xfe", "map": [("a", 1)],
        }
    ] * 2  # fmt: skip
    schema = pa.schema(
        {"prompt": pa.binary(), "responses": pa.list_(pa.binary()), "scores": pa.list_(pa.decimal128(4, 2)),
         "when": pa.timestamp("ns", tz="UTC"), "day": pa.date32(), "time": pa.time64("us"),
         "took": pa.duration("s"), "raw": pa.binary(), "map": pa.list_(pa.struct({"a": pa.int64()}))}
    )  # fmt: skip
    table = pa.Table.from_pylist([row | {"map": [{"a": 1}]} for row in rows], schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    row = rows_of(tmp_path / "rows.parquet")[0]
    assert json.loads(json.dumps(row)) == row
    assert row["scores"] == ROW["scores"]
    assert (row["when"][:19], row["day"], row["took"]) == ("2024-02-29T12:30:00", "2024-02-29", 90.0)
    assert row["raw"] == {"base64": "//4="}
    assert load(tmp_path / "rows.parquet", row_rules={"duplicate_response": "keep"})[0] == GROUP
    kept = load_groups(DataConfig(train_file=str(tmp_path / "rows.parquet")), keep_columns=True)[0]["train"]
    assert json.loads(kept[0]["columns"])["day"] == "2024-02-29"
    record = {"prompt": "p", "prompt_id": when, "response": "a", "score": 1}
    Dataset.from_list([record, record | {"response": "b", "score": 2}]).to_parquet(tmp_path / "long.parquet")
    assert load(tmp_path / "long.parquet")[0]["responses"] == ["a", "b"]


def test_a_value_that_python_does_not_have_costs_its_row(tmp_path):
    table = pa.Table.from_pylist([ROW, numbered(1)]).append_column("day", pa.array([0, 2**30], pa.date32()))
    pq.write_table(table, tmp_path / "rows.parquet")
    first, second = rows_of(tmp_path / "rows.parquet")
    assert first["day"] == "1970-01-01"
    assert second.reason == "not_json"


def test_names_of_class_labels_and_json_in_tables(tmp_path):
    label = ClassLabel(names=["rejected", "chosen"])
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": label})
    rows = [{"prompt": ASKED, "completion": text, "label": n} for text, n in [("Paris", 1), ("Rome", 0), ("Oslo", -1)]]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "kto")
    assert [row["label"] for row in rows_of(tmp_path / "kto")] == ["chosen", "rejected", None]
    config_ = DataConfig(dataset_mixer={str(tmp_path / "kto"): 1.0}, dataset_splits=["train"])
    kept = load_groups(config_)[0]["train"]
    assert (kept[0]["responses"], kept[0]["scores"]) == (["Paris", "Rome"], [1.0, 0.0])
    features = Features({"prompt": List(Json()), "tags": List(label), "picture": Image()})
    row = {"prompt": USER, "tags": [1, 0], "picture": {"bytes": b"no picture", "path": None}}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "rows.parquet")
    (found,) = rows_of(tmp_path / "rows.parquet")
    assert found == row | {"tags": ["chosen", "rejected"], "picture": {"bytes": "no picture", "path": None}}


def test_a_folder_with_two_splits_asks_for_one(tmp_path):
    parts = {"train": Dataset.from_list([ROW]), "test": Dataset.from_list([numbered(1)])}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    settings = {"output": str(tmp_path / "out.jsonl")}
    with pytest.raises(UserError, match=r"several splits, train, test: name one \(convert.py: --split"):
        convert([str(tmp_path / "both")], ConvertConfig(**settings))
    assert convert([str(tmp_path / "both")], ConvertConfig(**settings, split="test"))["rows_kept"] == 1


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="cache: the cache of rows cannot be made there.*set HF_DATASETS_CACHE"):
        load(write_jsonl(tmp_path / "rows.jsonl", [ROW]))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    settings = ConvertConfig(output=str(tmp_path / "out.jsonl"), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="tokenizer: .*nowhere"):
        convert([write_jsonl(tmp_path / "rows.jsonl", [ROW])], settings)
