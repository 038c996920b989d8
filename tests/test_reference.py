"""The reference's log-probs on disk: what they are keyed by, and that a run resumes from what is there."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from nca_trainer import NCATrainer
from tests.tiny import tiny_config
from tests.trainers import assert_same_curve, make_trainer, reward_rows, run
from trl_nca import logps
from trl_nca.code_hash import code_files
from trl_nca.reference import cache_file, describe_reference, reference_logps

ROWS = [
    {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "length": 4},
    {"prompt_ids": [6], "response_ids": [[7, 8, 9], [10]], "length": 4},
    {"prompt_ids": [6, 6, 6], "response_ids": [[7, 8, 9], [10], [11]], "length": 7},
]


def model(seed=0, adapters=("default",), **lora):
    torch.manual_seed(seed)
    base = LlamaForCausalLM(tiny_config())
    if not adapters:
        return base
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **{"r": 2} | lora)
    peft_model = get_peft_model(base, config, adapters[0])
    for name in adapters[1:]:
        peft_model.add_adapter(name, config)
    return peft_model


def key(model, rows=ROWS, adapter="default", **settings):
    about = describe_reference(model, Dataset.from_list(rows), adapter, **{"precision": "no"} | settings)
    json.dumps(about)
    return cache_file(about, "folder").name


def changed(model, change):
    """The model with the first parameter whose name contains `change` moved a little."""
    parameter = next(p for name, p in model.named_parameters() if change in name)
    parameter.data.view(-1)[0] += 1e-3
    return model


def test_what_does_not_matter_has_the_same_key(tmp_path):
    first = key(model())
    assert key(changed(model(), "lora_A.default")) == first
    assert key(changed(model(), "modules_to_save.default")) == first
    assert key(model(r=4)) == first, "the adapter that is switched off"
    assert key(model(), [row | {"weight": 2.0, "scores": [1, 0], "location": "here"} for row in ROWS]) == first
    model().base_model.model.save_pretrained(tmp_path)
    moved = model()
    moved.base_model.model.config._name_or_path = str(tmp_path)
    assert key(moved) == first, "where it was loaded from"
    extra = [row | {"scores": [0.0] * len(row["response_ids"])} for row in ROWS]
    assert key(model(), extra) == first, "the scores: no log-prob depends on them"


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(model(seed=1)),
        lambda: key(changed(model(), "q_proj.base_layer")),
        lambda: key(changed(model(), "original_module")),
        lambda: key(model(), ROWS[:2]),
        lambda: key(model(), [ROWS[1], ROWS[0], ROWS[2]]),
        lambda: key(model(), [ROWS[0] | {"response_ids": [[3, 4], [5]]}, *ROWS[1:]]),
        lambda: key(model(), [ROWS[0] | {"prompt_ids": [1], "response_ids": [[2, 3], [4, 5]]}, *ROWS[1:]]),
        lambda: key(model().to(torch.bfloat16)),
        lambda: key(model(), precision="bf16"),
        lambda: key(model(), adapter=None),
        lambda: key(model(adapters=())),
    ],
    ids=["weights", "one weight", "a saved module's original", "fewer rows", "order", "responses' borders",
         "prompt's border", "type", "precision", "adapter counts", "no adapter"],
)  # fmt: skip
def test_what_matters_has_another_key(other):
    assert other() != key(model())


def test_a_reference_adapter_counts_and_so_does_its_scaling():
    both = ("default", "ref")
    first = key(model(adapters=both))
    assert key(changed(model(adapters=both), "lora_A.default")) == first
    assert key(changed(model(adapters=both), "lora_A.ref")) != first
    assert key(model(adapters=both, lora_alpha=99)) != first


@pytest.mark.parametrize("module", ["layers", "head", "shared_prompt", "layout", "router", "logps", "collate"])
def test_the_code_of_the_engine_is_in_the_key(monkeypatch, module):
    first, read = key(model()), Path.read_bytes
    changed_file = Path(logps.__file__).with_name(f"{module}.py")
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b"#" * (file == changed_file))
    assert key(model()) != first


def test_so_is_whatever_the_engine_will_import(tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    for name, code in {"__init__": "", "one": "from pack.two import x", "two": "from pack import three", "three": "",
                       "four": ""}.items():  # fmt: skip
        (tmp_path / "pack" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert [file.stem for file in code_files(["pack.one"])] == ["one", "three", "two"]


def test_so_is_the_library_that_the_weights_are_quantized_with(monkeypatch):
    def packages(model):
        return describe_reference(model, Dataset.from_list(ROWS), None)["packages"]

    plain, quantized = model(adapters=()), model(adapters=())
    quantized.lm_head = bitsandbytes.nn.Linear4bit(32, 320, bias=False)
    assert packages(plain).keys() == {"peft", "torch", "transformers"}
    assert packages(quantized).keys() == {"bitsandbytes", "peft", "torch", "transformers"}
    first = key(quantized)
    monkeypatch.setattr(bitsandbytes, "__version__", "0.51")
    assert key(quantized) != first


def test_another_engine_has_another_key(monkeypatch):
    first = key(model())
    monkeypatch.setattr("trl_nca.reference.code_hash", lambda modules: "other")
    assert key(model()) != first


def scorer(seen, fail_after=None):
    def score(rows):
        if fail_after is not None and len(seen) >= fail_after:
            raise KeyboardInterrupt
        seen.extend(row["length"] for row in rows)
        return [[-float(sum(ids)) / 3 for ids in row["response_ids"]] for row in rows]

    return score


def test_a_killed_precompute_goes_on_where_it_stopped(tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [1], "response_ids": [[i], [i, i]], "length": 3 + i} for i in range(7)])
    expected = [[-i / 3, -2 * i / 3] for i in range(7)]
    file, seen = tmp_path / "deeper" / "file.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        reference_logps(rows, file, {"about": "x"}, scorer(seen, fail_after=4), 2, "")
    assert seen == [9, 8, 7, 6], "longest first"
    with file.open("a") as stream:
        stream.write('{"row": 2, "logps": [-0.1')  # cut by the kill
    seen = []
    assert reference_logps(rows, file, {"about": "x"}, scorer(seen), 2, "") == expected
    assert seen == [5, 4, 3]
    assert reference_logps(rows, file, {"about": "x"}, scorer([], fail_after=0), 2, "") == expected
    assert json.loads(file.read_text().splitlines()[0]) == {"about": "x"}


def test_a_second_run_does_not_run_the_reference(tmp_path, monkeypatch):
    rows, settings = reward_rows(20), {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "cache")}
    first = run(tmp_path, rows, **settings)

    def never(*args):
        raise AssertionError("the reference was run")

    with monkeypatch.context() as patch:
        patch.setattr(NCATrainer, "compute_ref_log_probs", never)
        assert_same_curve(first, run(tmp_path, rows, **settings))
        run(tmp_path, rows, **settings, loss_type="InfoNCA", beta=0.3, alpha=1.0, learning_rate=1e-3)
        run(tmp_path, rows, **settings, max_tokens_per_forward=50)
        with pytest.raises(AssertionError, match="was run"):
            run(tmp_path, rows, **settings, max_length=20)
        with pytest.raises(AssertionError, match="was run"):
            run(tmp_path, rows.select(range(19)), **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_precision_survives_the_disk(tmp_path):
    settings = {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path)}
    trainer = make_trainer(tmp_path, reward_rows(6), **settings)
    from_disk = make_trainer(tmp_path, reward_rows(6), **settings).train_dataset["ref_logps"][:]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    computed = trainer.compute_ref_log_probs(trainer.model, batch)
    for row, values in zip(computed, from_disk, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), rtol=1e-6, atol=1e-5)
