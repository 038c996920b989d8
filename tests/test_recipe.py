"""Recipes: every YAML parses, overrides win, old keys are translated, mistakes are named."""

import itertools
import json
import logging
import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from alignment.configs import Configs, describe_loss
from alignment.data.load import DataConfig, load_groups
from alignment.errors import UserError
from alignment.models import PolicyConfig
from alignment.output import resolve, start
from alignment.recipe import OLD_KEYS, RunConfig
from alignment.recipe.parse import parse_recipe
from benchmarks.figure2 import parse_sweep, sweep_arms
from nca_trainer import NCAConfig
from tests.conftest import ROOT
from tests.scripts import documentation

TYPES = [DataConfig, PolicyConfig, RunConfig, NCAConfig]
MINIMAL = {"model_name_or_path": "some/model", "train_file": "rows.jsonl", "output_dir": "out", "bf16": False}

#: A recipe as the 2024 scripts and the alignment-handbook of its time had it.
RECIPE_2024 = """
model_name_or_path: some/model
torch_dtype: bfloat16
use_flash_attention_2: true
use_peft: true
load_in_4bit: true
lora_r: 16
lora_target_modules:
- q_proj
- v_proj
dataset_mixer:
  some/rewards: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: false
beta: 0.01
temperature_alpha: 0.0001
do_eval: true
evaluation_strategy: steps
eval_steps: 200
loss_type: NCA #
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: zephyr-7b-NCA-qlora
learning_rate: 5.0e-6
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
optim: adamw_torch
output_dir: data/test_run
save_strategy: "epoch"
save_total_limit: null
warmup_ratio: 0.1
"""


def write(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return str(path)


def parse(tmp_path, recipe, *overrides):
    return parse_recipe([write(tmp_path, recipe), *overrides], TYPES)


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_parses_and_each_key_has_a_comment(path):
    parse_recipe([str(path)], TYPES)
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", " ")) and ":" in line:
            assert "#" in line, f"{path.name}: {line.split(':')[0]} has no comment"


def test_overrides_win_over_the_recipe(tmp_path):
    recipe = MINIMAL | {"beta": 0.5, "loss_type": "NCA", "lora_target_modules": ["a", "b"]}
    _, policy, _, args = parse(
        tmp_path, recipe, "--beta=0.01", "--loss_type", "infonca", "--lora_target_modules", "c", "d", "e"
    )
    assert (args.beta, args.loss_type) == (0.01, "InfoNCA")
    assert policy.lora_target_modules == ["c", "d", "e"]


def test_an_empty_override_takes_the_key_back(tmp_path):
    recipe = MINIMAL | {"eval_file": "held_out.jsonl", "max_prompt_length": 9, "logging_steps": 3, "beta": 0.7}
    flags = ["--eval_file=", "--max_prompt_length=null", "--logging_steps=", "--beta="]
    data, _, _, args = parse(tmp_path, recipe, *flags)
    assert data.eval_file is None
    assert args.max_prompt_length is None
    assert (args.logging_steps, args.beta) == (10, 0.01), "the defaults"


def test_yaml_values_arrive_with_their_types(tmp_path):
    recipe = MINIMAL | {
        "train_file": None, "learning_rate": "5e-6", "use_peft": True, "save_total_limit": None,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "dataset_mixer": {"x": 0.5},
        "dataset_splits": ["train", "test"],
    }  # fmt: skip
    data, policy, run, args = parse(tmp_path, recipe)
    assert args.learning_rate == 5e-6
    assert policy.use_peft is True
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert data.dataset_mixer == {"x": 0.5}
    assert data.dataset_splits == ["train", "test"]
    assert args.save_total_limit is None
    assert run.overwrite_output_dir is False


@pytest.mark.parametrize(
    ("recipe", "flags", "strategy", "words"),
    [
        ({"group_by_length": True}, [], "group_by_length", "group_by_length is now called train_sampling_strategy"),
        ({"group_by_length": False}, [], "random", "false is now called the default"),
        ({}, ["--group_by_length"], "group_by_length", "true is now called group_by_length"),
        ({"train_sampling_strategy": "group_by_length"}, ["--group_by_length=false"], "random", "called the default"),
    ],
)
def test_group_by_length_is_translated(tmp_path, caplog, recipe, flags, strategy, words):
    with caplog.at_level(logging.WARNING):
        args = parse(tmp_path, MINIMAL | recipe, *flags)[3]
    assert args.train_sampling_strategy == strategy
    assert words in caplog.text and "no effect" not in caplog.text


def test_a_2024_recipe_is_translated_and_each_old_key_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data, policy, _, args = parse(tmp_path, RECIPE_2024)
    assert policy.dtype == "bfloat16"
    assert policy.attn_implementation == "flash_attention_2"
    assert data.dataset_mixer == {"some/rewards": 1.0}
    assert args.dataset_num_proc == 12
    assert args.alpha == 1e-4
    assert args.eval_strategy == "steps"
    assert args.warmup_steps == 0.1
    assert args.get_warmup_steps(100) == 10
    assert args.max_prompt_length == 512
    for old in ("torch_dtype", "use_flash_attention_2", "preprocessing_num_workers", "temperature_alpha",
                "evaluation_strategy", "warmup_ratio"):  # fmt: skip
        assert sum(f" {old} is now called" in message for message in caplog.messages) == 1


def test_old_keys_work_on_the_command_line_and_win_over_the_recipe(tmp_path):
    _, _, _, args = parse(tmp_path, MINIMAL | {"alpha": 0.5}, "--temperature_alpha=0.25")
    assert args.alpha == 0.25


def test_handbook_losses_and_flash_attention_off(tmp_path):
    recipe = MINIMAL | {"loss_type": "sigmoid", "use_flash_attention_2": False}
    _, policy, _, args = parse(tmp_path, recipe)
    assert args.loss_type == "DPO"
    assert policy.attn_implementation is None


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"loss_type": "ipo"}, {"loss_type": "IPO"}),
        ({"loss_type": "robust", "label_smoothing": 0.1}, {"loss_type": "robustDPO", "label_smoothing": 0.1}),
        ({"loss_type": "bco_pair"}, {"loss_type": "biasedNCA"}),
        ({"loss_type": "sigmoid_norm"}, {"loss_type": "DPO", "normalize": "tokens"}),
        ({"loss_type": ["dpo_norm"]}, {"loss_type": "DPO", "normalize": "tokens"}),
        ({"loss_type": "simpo", "simpo_gamma": 0.3}, {"loss_type": "SimPO", "margin": 0.3}),
        ({"loss_type": "sigmoid", "rpo_alpha": 0.2}, {"loss_type": "DPO", "sft_weight": 0.2}),
        ({"loss_type": "sigmoid", "rpo_alpha": None}, {"loss_type": "DPO", "sft_weight": 0.0}),
        ({"loss_type": ["sigmoid", "sft"]}, {"loss_type": "DPO", "sft_weight": 1.0, "loss_weights": None}),
        (
            {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1.0, 0.2]},
            {"loss_type": "DPO", "sft_weight": 0.2, "normalize": "tokens", "loss_weights": None},
        ),
    ],
)
def test_upstreams_losses(tmp_path, recipe, expected):
    *_, args = parse(tmp_path, MINIMAL | recipe)
    assert {key: getattr(args, key) for key in expected} == expected
    words = [
        [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        for key, value in recipe.items()
        if value is not None
    ]
    *_, args = parse(tmp_path, MINIMAL, *itertools.chain.from_iterable(words))
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (  # the same but for the learning rate: not exact
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 1.0]},
            r"recipe.yaml: loss_type: a run has one loss, not \[sigmoid, sft\]; .* is DPO with sft_weight: w",
        ),
        ({"loss_type": ["sigmoid", "bco_pair", "sft"]}, r"one loss, not \[sigmoid, bco_pair, sft\]"),
        ({"loss_type": "hinge"}, "unknown loss 'hinge'"),
    ],
)
def test_losses_that_are_not_here_are_refused(tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, MINIMAL | recipe)


def test_handbook_2025_mixture(tmp_path):
    mixture = {"datasets": [{"id": "x", "config": "default", "split": "train", "weight": 0.5}], "test_split_size": 10}
    recipe = {k: v for k, v in MINIMAL.items() if k != "train_file"} | {"dataset_mixture": mixture}
    data, *_ = parse(tmp_path, recipe)
    assert data.dataset_mixture == mixture


def test_every_old_key_leads_to_a_known_key():
    known = {name for config in TYPES for name in config.__dataclass_fields__}
    assert {new for new in OLD_KEYS.values() if new} <= known
    assert not set(OLD_KEYS) & known, "a key cannot be old and known"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (MINIMAL | {"betta": 0.1}, [], r"recipe.yaml: unknown key 'betta'; did you mean 'beta'\?"),
        (MINIMAL, ["--los_type=NCA"], r"^unknown flag --los_type; did you mean --loss_type\?"),
        (MINIMAL, ["--bet=1"], "unknown flag --bet"),
        (MINIMAL, ["beta=1"], "write --key=value"),
        (
            MINIMAL | {"loss_type": "foo"},
            [],
            "recipe.yaml: loss_type: unknown loss 'foo', .*, biasedNCA$",
        ),
        (MINIMAL, ["--loss_type=NCAA"], r"^--loss_type=NCAA: unknown loss 'NCAA', .*; did you mean 'NCA'\?$"),
        (MINIMAL | {"loss_type": "foo"}, ["--beta=1"], "recipe.yaml: loss_type: unknown"),
        (MINIMAL, ["--eval_strategy", "step"], r"^--eval_strategy=step: invalid choice.*; did you mean 'steps'\?$"),
        (MINIMAL, ["--eval-strategy=step"], r"^--eval_strategy=step: invalid choice.*; did you mean 'steps'\?$"),
        (MINIMAL | {"parallel": "zero"}, [], r"recipe.yaml: parallel: invalid choice.*; did you mean 'zero[23]'\?$"),
        (MINIMAL | {"max_prompt_length": 50}, ["--max_length=40"], "^--max_length=40: max_prompt_length: 50 fills"),
        (MINIMAL | {"alpha": -1}, ["--score=overall"], "recipe.yaml: alpha: must be >= 0"),
        (MINIMAL | {"alpha": -1}, [], "alpha: must be >= 0"),
        (MINIMAL, ["--beta=0"], "^--beta=0: must be > 0"),
        (MINIMAL | {"lora_r": "many"}, [], r"recipe.yaml: lora_r: invalid int value: 'many'"),
        (MINIMAL, ["--beta=much"], "^--beta=much: invalid float value: 'much'"),
        (MINIMAL | {"eval_strategy": "sometimes"}, [], "eval_strategy"),
        (MINIMAL | {"load_in_4bit": True}, [], "set use_peft: true"),
        ({"model_name_or_path": "m", "output_dir": "o"}, [], "no training data"),
        ({"train_file": "t", "output_dir": "o"}, [], "no model given"),
        (MINIMAL | {"activation_offloading": True}, [], "activation_offloading: True is not supported: .*max_tokens"),
        (MINIMAL | {"gradient_checkpointing_kwargs": {"offload": True}}, [], "kwargs: offload is not supported"),
        (MINIMAL, ['--activation_checkpointing_kwargs={"every_n_layers": 2}'], "kwargs: every_n_layers is not support"),
        (MINIMAL | {"gradient_checkpointing": "maybe"}, [], "recipe.yaml: .*: true, false or auto; got 'maybe'"),
        (MINIMAL, ["--gradient_checkpointing=2"], "^--gradient_checkpointing=2: true, false or auto; got '2'"),
        ("a: [1", [], "not valid YAML"),
        ("- a\n- b", [], "a recipe is a mapping"),
        ("", [], "a recipe is a mapping"),
        ("1: 2", [], "a recipe is a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, recipe, *overrides)


@pytest.mark.parametrize(
    ("lines", "key", "expected"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),
        ("evaluation_strategy: off", "eval_strategy", "no"),
        ("save_strategy: No", "save_strategy", "no"),
        ("logging_strategy: false", "logging_strategy", "no"),
        ("shared_prompt: no", "shared_prompt", "false"),
        ("bf16: no", "bf16", False),
        ("report_to: [tensorboard, wandb]", None, "report_to: (tensorboard|wandb) is not installed"),
        ("report_to: []", "report_to", []),
        ("report_to: null", "report_to", []),
        ("report_to: none", "report_to", []),
        ("report_to: no", "report_to", []),
        ("scale_scores: no", "scale_scores", "none"),
        ("save_total_limit: null", "save_total_limit", None),
        ("lora_r: null", None, "recipe.yaml: lora_r: null is no number; leave the key out for 16"),
        ("warmup_ratio: null\nwarmup_steps: 3", "warmup_steps", 3),
        ("warmup_ratio: null", "warmup_steps", 0),
        ("report_to: [none]", "report_to", []),
        ("loss_type: [sigmoid]", "loss_type", "DPO"),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("optim_target_modules: [a, b]", "optim_target_modules", ["a", "b"]),
        ("optim_target_modules: all-linear", "optim_target_modules", "all-linear"),
        ("seed: 010", "seed", 10),
        ("model_revision: 0012e4", "model_revision", "0012e4"),
        ("run_name: 12:30", "run_name", "12:30"),
        ("run_name: 2024-1-2", "run_name", "2024-1-2"),
        ("seed: 0x10", "seed", 16),
        ("max_grad_norm: .inf", "max_grad_norm", float("inf")),
        ("lr_scheduler_kwargs: {min_lr: 5e-7}", "lr_scheduler_kwargs", {"min_lr": 5e-7}),
        ("model_init_kwargs: {a: {b: [1e-3, '1e-3']}}", "model_init_kwargs", {"a": {"b": [1e-3, "1e-3"]}}),
        ("dataset_splits: []", "dataset_splits", None),
        ("beta: 0.5\nalpha: 1\nbeta: 0.1", None, "recipe.yaml, line 3: the key 'beta' stands twice, first in line 1"),
        ("model_init_kwargs:\n  a: {x: 1}\n  b:\n    - {y: 1, y: 2}", None, "line 4: the key 'y' stands twice"),
        ("warmup_ratio: 0.1\nwarmup_steps: 0", "warmup_steps", 0.1),
        ("warmup_ratio: 0.1\nwarmup_steps: 0.0", "warmup_steps", 0.1),
        ("warmup_ratio: 0.1\nwarmup_steps: 7", "warmup_steps", 7),
        ("warmup_ratio: 0.1\nwarmup_steps: null", "warmup_steps", 0.1),
        ("warmup_ratio: 0.0\nwarmup_steps: 7", "warmup_steps", 7),
        ("warmup_ratio: 1.0", None, "warmup_ratio: a share of all steps, from 0 to below 1; got 1"),
        ("output_dir: $RUNS/a", "output_dir", "/scratch/runs/a"),
        ("output_dir: ~/a${RUNS}", "output_dir", "/home/me/a/scratch/runs"),
        ("output_dir: $RUNS_OF/a", None, r"recipe.yaml: output_dir: \$RUNS_OF/a: the variable RUNS_OF is not set"),
        ("reward_function: $RUNS/f.py:f", "reward_function", "/scratch/runs/f.py:f"),
        ("chat_template: '{{ a }} costs $RUNS'", "chat_template", "{{ a }} costs $RUNS"),
        ("lora_target_modules: ['.*q$|.*v$']", "lora_target_modules", ".*q$|.*v$"),
    ],
)
def test_spellings_of_yaml_mean_what_they_say(tmp_path, monkeypatch, lines, key, expected):
    monkeypatch.setenv("RUNS", "/scratch/runs")
    monkeypatch.setenv("HOME", "/home/me")
    given = {line.split(":")[0] for line in lines.splitlines()}
    rest = yaml.safe_dump({name: value for name, value in MINIMAL.items() if name not in given})
    if key is None:
        with pytest.raises(UserError, match=expected):
            parse(tmp_path, f"{lines}\n{rest}")
        return
    configs = parse(tmp_path, f"{lines}\n{rest}")
    assert next(getattr(config, key) for config in configs if hasattr(config, key)) == expected


def test_spellings_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "/scratch/runs")
    flags = ["--report_to", "none", "--output_dir=$RUNS/b", '--dataset_mixer={"$RUNS/c": 5e-1}', "--train_file="]
    data, _, _, args = parse(tmp_path, MINIMAL, *flags)
    assert (args.report_to, args.output_dir, data.dataset_mixer) == ([], "/scratch/runs/b", {"/scratch/runs/c": 0.5})
    with pytest.raises(UserError, match="^--beta=null: null is no number; leave the key out for 0.01"):
        parse(tmp_path, MINIMAL | {"beta": 3}, "--beta=null")
    with pytest.raises(UserError, match="^--train_file: .* NOWHERE is not set"):
        parse(tmp_path, MINIMAL, "--train_file=${NOWHERE}/rows.jsonl")


@pytest.mark.parametrize("weight", [0, 1.5, -1, "many", None, ".nan"])
def test_a_weight_is_a_share(weight):
    for key, value in (
        ("dataset_mixer", {"rows.jsonl": weight}),
        ("dataset_mixture", {"datasets": [{"id": "rows.jsonl", "weight": weight}]}),
    ):
        with pytest.raises(UserError, match=f"{key}: the (fraction|weight) of rows.jsonl must be above 0 and at most"):
            load_groups(DataConfig(**{key: value}))


def test_the_loss_is_named_and_pairs_need_its_name(tmp_path):
    def loss(recipe, *flags, pairs=False):
        return describe_loss(Configs(*parse(tmp_path, MINIMAL | recipe, *flags)), pairs)

    assert loss({}) == (
        "Loss: NCA (the default: loss_type is not given), beta 0.01 (the default; TRL's is 0.1), alpha 0.0001 "
        "(the default)"
    )
    assert "beta 0.01 (the default, for sums; " in loss({"loss_type": "DPO", "normalize": "tokens"})
    given = {"loss_type": "InfoNCA", "beta": 0.1, "alpha": 0.5}
    assert loss(given | {"tie_break": 0.01}) == "Loss: InfoNCA, beta 0.1, alpha 0.5, tie_break 0.01"
    assert loss(given, "--loss_type=sigmoid", pairs=True) == "Loss: DPO, beta 0.1"
    flags = ["--margin=0", "--normalize=tokens", "--ld_alpha=0", "--reference_free=true"]
    line = "Loss: DPO, beta 0.1, margin 0, normalize tokens, ld_alpha 0, reference_free true"
    assert loss(given, "--loss_type=sigmoid", *flags, pairs=True) == line
    assert loss(given, "--loss_type=QRPO", "--sft_weight=0.2") == "Loss: QRPO, beta 0.1, sft_weight 0.2"
    with pytest.raises(UserError, match="loss_type: is not given, .* means DPO by that; set --loss_type=DPO, or"):
        loss({"beta": 0.1}, pairs=True)
    with pytest.raises(UserError, match="loss_type: is not given"):
        loss(given, "--loss_type=", pairs=True)


def test_a_loss_of_ones_own_is_recorded_with_its_hash(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(rewards, targets, response_mask):\n    return -(rewards * targets).sum(-1)\n")
    recipe = resolve(parse(tmp_path, MINIMAL, f"--loss_type={file}:loss"))
    assert recipe["loss_type"] == f"{file}:loss"
    assert parse(tmp_path, recipe)[3].loss.num_responses is None
    file.write_text(file.read_text().replace("-(", "-2 * ("))
    with pytest.raises(UserError, match="loss_file_hash: .* is not the file that the run began with"):
        parse(tmp_path, recipe)
    with pytest.raises(UserError, match=r"^--loss_type=.*mine.py has no function 'other'"):
        parse(tmp_path, MINIMAL, f"--loss_type={file}:other")


def test_a_losss_own_defaults_are_not_left_in_the_recipe(tmp_path):
    recipe = resolve(parse(tmp_path, MINIMAL, "--loss_type=SimPO"))
    args = parse(tmp_path, recipe, "--loss_type=DPO")[3]
    assert (args.margin_of_best, args.has_reference, args.per_token) == (0, True, False)


def test_no_recipe_and_missing_recipe():
    with pytest.raises(UserError, match="no recipe given"):
        parse_recipe(["--beta=1"], TYPES)
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        parse_recipe(["nowhere.yaml"], TYPES)


def test_resolved_recipe_parses_again(tmp_path):
    configs = parse(tmp_path, MINIMAL | {"output_dir": str(tmp_path / "out"), "alpha": 0.3})
    start(str(tmp_path / "out"), resolve(configs), plan={}, data_report={}, overwrite=False)
    again = parse_recipe([str(Path(tmp_path) / "out" / "recipe.yaml")], TYPES)
    assert again[3].alpha == 0.3
    assert json.dumps(again[0].__dict__) == json.dumps(configs[0].__dict__)


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ({"gradient_checkpointing": "auto"}, [], "auto"),
        ({}, ["--gradient_checkpointing=Auto"], "auto"),
        ({"gradient_checkpointing": "auto"}, ["--gradient_checkpointing"], True),
        ({"gradient_checkpointing": "auto"}, ["--no_gradient_checkpointing"], False),
        ({"gradient_checkpointing": "auto"}, ["--gradient_checkpointing=no"], False),
        ({"gradient_checkpointing": "auto"}, ["--gradient_checkpointing="], True),
        ({"gradient_checkpointing": False}, ["--gradient_checkpointing", "auto"], "auto"),
        ({"gradient_checkpointing": "auto"}, ["--activation_checkpointing=false"], False),  # transformers' newer name
        ({"gradient_checkpointing": None}, [], False),
        ({}, [], True),
    ],
)  # fmt: skip
def test_spellings_of_gradient_checkpointing(tmp_path, recipe, flags, expected):
    configs = parse(tmp_path, MINIMAL | recipe, *flags)
    assert configs[3].gradient_checkpointing == configs[3].activation_checkpointing == expected
    resolved = resolve(configs)
    assert resolved["gradient_checkpointing"] == expected
    again = parse(tmp_path, resolved, "--gradient_checkpointing=auto")[3]
    assert again.gradient_checkpointing == "auto", "a flag on a resolved recipe counts"


def test_gradient_checkpointing_without_the_scripts():
    """`auto` is true to all that reads it; words are as good as booleans."""
    for given, expected in (("True", True), ("false", False), ("AUTO", "auto"), (False, False)):
        assert NCAConfig("out", bf16=False, gradient_checkpointing=given).activation_checkpointing == expected
    with pytest.raises(ValueError, match="gradient_checkpointing: true, false or auto; got 'of'"):
        NCAConfig("out", bf16=False, gradient_checkpointing="of")


PAGES = ROOT / "docs" / "scripts"


def readme_commands():
    """Every documented `run_*.py RECIPE --flags`."""
    runs = re.finditer(r"run_(?:reward|preference)\.py (yamls/\S+\.yaml(?: --[^\s`]+)*)", documentation())
    return sorted({m.group(1) for m in runs})


def script_flags():
    """The flags with which each script of alignment-handbook/scripts is called in the documentation."""
    found = defaultdict(set)
    for m in re.finditer(r"alignment-handbook/scripts/(\w+\.py)([^`\n]*)", documentation()):
        found[m.group(1)] |= set(re.findall(r"--\w+", m.group(2)))
    return {script: flags for script, flags in found.items() if flags}


DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *ROOT.glob("[a-z]*/*.md"),
    *PAGES.glob("*.md"),
]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_prose_is_narrow(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert not [line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "!["))]


def test_the_readme_is_short_and_has_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert len(readme_commands()) >= 5


def test_the_pages_of_scripts_are_those_of_their_parsers():
    """One test for all scripts, because they are slow to import. Where it fails, run `make docs`."""
    generator = runpy.run_path(str(ROOT / "docs" / "generate_options.py"))
    for page in PAGES.glob("*.md"):
        assert generator["with_tables"](page) == page.read_text(), f"{page.name}: run `make docs`"
    for name, flags in script_flags().items():
        page = (PAGES / name).with_suffix(".md").read_text()
        assert flags <= set(re.findall(r"^\| `(--\w+)`", page, re.M)), name


def test_a_chatty_log_level_counts_on_the_command_line_alone(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert parse(tmp_path, MINIMAL | {"log_level": "info"})[3].log_level == "passive"
    assert "log_level: info is left out; --log_level=info counts" in caplog.text
    assert parse(tmp_path, MINIMAL | {"log_level": "info"}, "--log_level=info")[3].log_level == "info"
    assert parse(tmp_path, MINIMAL | {"log_level": "error"})[3].log_level == "error"


def test_a_broken_tracker_is_named(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"report_to=trackio: trackio cannot be imported \(No module named 'no_such_module'\); install it anew"
    with pytest.raises(UserError, match=f"^--{message}"):
        parse(tmp_path, MINIMAL, "--report_to=trackio")
    with pytest.raises(UserError, match=f"recipe.yaml: {message.replace('=trackio', '')}"):
        parse(tmp_path, MINIMAL | {"report_to": "trackio"})


def test_a_flag_with_dashes_is_the_same_flag(tmp_path):
    configs = parse(tmp_path, MINIMAL | {"loss_type": "NCA"}, "--loss-type=DPO", "--no-gradient-checkpointing")
    assert (configs[3].loss_type, configs[3].gradient_checkpointing) == ("DPO", False)
    assert configs[2].given["loss_type"] == ["--loss_type=DPO"]


def test_every_script_has_a_page():
    scripts = [*ROOT.glob("run_*.py"), *ROOT.glob("alignment-handbook/scripts/*.*")]
    assert {path.stem for path in scripts} == {path.stem for path in PAGES.glob("*.md")}


def test_every_documented_make_target_and_benchmark_is_there():
    targets = re.findall(r"^(?:.*`)?make ([a-z]\w+)(?:`|$)", documentation(), re.M)
    assert len(targets) >= 5
    assert set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    benchmarks = re.findall(r"python -m benchmarks\.(\w+)", documentation())
    assert benchmarks
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in benchmarks)


def documented_sweeps():
    return sorted(set(re.findall(r"--sweep ([^`\n]+)", documentation())))


@pytest.mark.parametrize("sweep", documented_sweeps())
def test_every_documented_sweep_parses(sweep):
    assert sweep_arms(parse_sweep([word for word in sweep.split() if "=" in word]))


def documented_code():
    return re.findall(r"```python\n(.*?)```", documentation(), re.S)


@pytest.mark.parametrize("code", documented_code(), ids=range(len(documented_code())))
def test_documented_code_runs(code, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    code = code.replace("models/SmolLM2-135M-Instruct", tiny_model).replace("runs/mine-merged", tiny_model)
    exec(code, {})


@pytest.mark.parametrize("command", readme_commands())
def test_every_documented_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_recipe(command.split(), TYPES)
