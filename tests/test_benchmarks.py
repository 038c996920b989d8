"""The benchmarks measure what they say: the same rows for all, each system's step, the count of operations."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, MistralConfig

from benchmarks import bench, data, pieces, systems
from benchmarks.bench import CASES, main, table
from benchmarks.flops import count_flops, model_flops
from benchmarks.measure import choose_setting, measure
from benchmarks.prefixes import count_group, draw_group, search_tree, trie_nodes
from benchmarks.rows import Case, draw_rows
from benchmarks.systems import BEST, SYSTEMS, UPSTREAM_BEST, Setting, random_mistral_4bit
from tests.conftest import ROOT, needs_model
from tests.tiny import tiny_config, tiny_tokenizer

CASE = Case("tiny", 3, 12, 20, prompts=2, vocabulary=320)
PAIRS = Case("tiny pairs", 2, 12, 20, prompts=3, vocabulary=320)


def tiny_base(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**settings))


@pytest.fixture(autouse=True)
def no_embedded_tokenizer(monkeypatch):
    monkeypatch.setattr(systems, "tokenizer", tiny_tokenizer)


def gradient(system, case, rows):
    runner = SYSTEMS[system](tiny_base(), case, "cpu")
    torch.manual_seed(1)
    trained = {name: p for name, p in runner.model.named_parameters() if p.requires_grad}
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    runner.backward(runner.ready(rows))
    return torch.cat([p.grad.flatten() for p in trained.values()])


@pytest.mark.parametrize(
    ("case", "one", "other"),
    [
        (CASE, "padded", "ours"),
        (CASE, "padded", "ours, reference cached"),
        (PAIRS, "upstream", "ours, one micro-batch"),
    ],
)
def test_all_systems_do_the_same_step(case, one, other, monkeypatch):
    rows = draw_rows(case, case.prompts)
    if case is PAIRS:  # upstream takes the first for the better one
        monkeypatch.setattr(systems, "ALPHA", 1e-9)
        rows = [row | {"scores": [1.0, 0.0]} for row in rows]
    expected, found = (gradient(system, case, rows) for system in (one, other))
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_lengths_are_those_of_the_case():
    for case in CASES:
        rows = draw_rows(case, 200)
        mean = sum(len(r) for row in rows for r in row["response_ids"]) / (200 * case.num_responses)
        assert mean == pytest.approx(case.response_tokens, rel=0.2)
        assert {len(row["response_ids"]) for row in rows} == {case.num_responses}
        assert rows == draw_rows(case, 200), "another process draws the same rows"


def test_shared_beginnings_are_counted():
    rng = random.Random(0)
    for _ in range(200):
        responses = [rng.choices("ab", k=rng.randint(1, 6)) for _ in range(rng.randint(1, 6))]
        beginnings = {tuple(r[:stop]) for r in responses for stop in range(1, len(r) + 1)}
        assert trie_nodes(responses) == len(beginnings)
    # Run are (last, 1, 2), (last, 1) and (last): all of the second and third stand in the first.
    assert count_group(5, [[1, 2, 3], [1, 2], [4]]) == (3, 4 + 6, 3, 0)
    # Of four paths of two turns, two and two have the first turn in common; all have the prompt's last token.
    assert draw_group(search_tree(2, 2), 1, 10) == (4, 80, 23, 22)


@pytest.mark.parametrize("cached", [False, True])
def test_operations_are_counted_as_torch_counts_them(cached):
    # Many layers: the first one's gradient by its input is not needed, and the count by hand does not know.
    runner = SYSTEMS["ours, reference cached" if cached else "ours"](tiny_base(num_hidden_layers=12), CASE, "cpu")
    rows = runner.ready(draw_rows(CASE, 2))
    # Which torch does not count.
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        runner.backward(rows)
    by_hand = model_flops(
        rows, count_flops(runner.model) | {"pair": 0}, cached
    )  # torch does not count attention on a CPU
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert by_hand == pytest.approx(products, rel=0.05)


def test_a_random_mistral_in_4_bit_takes_a_step():
    small = {k: v for k, v in tiny_config().to_dict().items() if k in MistralConfig().to_dict()}
    base = random_mistral_4bit(MistralConfig(**small | {"hidden_size": 64, "model_type": "mistral"}), "cpu")
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    runner = SYSTEMS["ours"](base, CASE, "cpu")
    runner.backward(draw_rows(CASE, 1))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in runner.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [UPSTREAM_BEST, BEST])
def test_a_system_does_the_same_step_with_each_setting(name, monkeypatch):
    case = replace(PAIRS, prompts=4)
    runner, rows = SYSTEMS[name](tiny_base(), case, "cpu"), draw_rows(case, 4)
    trained = [p for p in runner.model.parameters() if p.requires_grad]
    for p in trained:
        torch.nn.init.normal_(p, std=0.1)
    gradients = []
    for setting in runner.settings:
        runner.use(setting)
        assert runner.model.get_base_model().is_gradient_checkpointing == setting.checkpointing
        runner.backward(rows)
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        runner.model.zero_grad()
    assert len(gradients) == (6 if name == UPSTREAM_BEST else 2)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_a_system_is_given_the_fastest_setting_that_fits(monkeypatch):
    settings = [Setting(True, 8), Setting(True, 4), Setting(False, 8), Setting(False, 4)]
    seconds = dict(zip(settings, [4.0, 3.0, math.inf, 2.0], strict=True))
    clock = [0.0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])

    class Runner:
        settings = list(seconds)
        model = torch.nn.Linear(1, 1)
        ready = staticmethod(lambda rows: rows)

        def use(self, setting):
            self.setting = setting

    def step(rows):
        if rows == ["longest"] and runner.setting == Setting(False, 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        clock[0] += seconds[runner.setting]

    runner = Runner()
    tried = choose_setting(runner, step, ["longest"], ["typical"])
    assert tried == {"checkpointing, 8 at once": 4.0, "checkpointing, 4 at once": 3.0,
                     "no checkpointing, 8 at once": "out of memory", "no checkpointing, 4 at once": 2.0}  # fmt: skip
    assert runner.setting == Setting(False, 4)


class FakeWorker:
    """A worker whose steps take a given time, or fail."""

    asked = []

    def __init__(self, system, case, model_name, device):
        self.system, self.pipe, self.first = system, self, True

    def send(self, what):
        self.asked.append(self.system)

    def stop(self):
        pass

    def answer(self):
        if self.system == "upstream":
            return {"failed": "OutOfMemoryError: no memory"}
        if self.first:
            self.first, flops = False, {"frozen": 1, "lora": 1, "head": 1, "pair": 1}
            return {"flops": flops, "base": 1e9, "given": "no checkpointing", "checkpointing": False, "tried": {}}
        return {"seconds": 6.0 if self.system == "padded" else 2.0, "peak": 1e9}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_system_that_fails_leaves_the_others(device, monkeypatch):
    case = replace(PAIRS, systems=("padded", "upstream", "ours"))
    monkeypatch.setattr("benchmarks.measure.Worker", FakeWorker)
    monkeypatch.setattr("benchmarks.measure.matmul_rate", lambda device, precision: 1e12)
    monkeypatch.setattr(FakeWorker, "asked", [])
    found = measure(case, draw_rows(case, 2 * case.prompts), "a model", device)["systems"]
    assert found["padded"]["times_slower_than_ours"] == 3 and found["padded"]["seconds"] == [6.0, 6.0]
    assert found["upstream"] == {"failed": "OutOfMemoryError: no memory"}
    asked = FakeWorker.asked
    assert 1 + sum(a != b for a, b in zip(asked, asked[1:], strict=False)) == (3 if device == "cuda" else 9)


def test_the_table_has_a_line_for_each_system():
    figures = {"seconds_per_step": 2.0, "response_tokens_per_second": 10.0, "peak_memory_gb": 1.0, "utilisation": 0.5}
    figures |= {"given": "no checkpointing, 1 at once", "times_slower_than_ours": 2.5, "memory_of_ours": 0.4}
    systems = {"padded": figures, "upstream": {"failed": "OutOfMemoryError: no memory"}, "ours": figures}
    lines = table([{"case": {"name": "K=4"}, "systems": systems}])
    assert "| K=4 | padded | no checkpointing, 1 at once | 2.00 | 10 | 1.00 | 0.50 | 2.50x | 0.40x |" in lines
    assert "| K=4 | upstream | OutOfMemoryError: no memory | " in lines
    assert "| K=4 | ours | no checkpointing, 1 at once | 2.00 | 10 | 1.00 | 0.50 | | |" in lines


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cuda"])
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "no GPU found" in capsys.readouterr().err


def test_step_zero_of_the_padded_reference():
    model = SYSTEMS["padded"](tiny_base(), CASE, "cpu").model
    (row,) = draw_rows(CASE, 1)
    assert systems.padded_loss(model, row, 0.1, 0.1, "cpu").item() == pytest.approx(2 * math.log(2))


@needs_model
def test_both_ways_of_preparing_data_give_the_same_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data.write_rows(tmp_path, 6)
    tokens = {system: prepare(tmp_path, 1) for system, prepare in data.SYSTEMS.items()}
    assert tokens["ours"] == tokens["upstream"] > 6 * data.RESPONSES * data.RESPONSE_WORDS
    assert "6 of 6 rows kept" in capsys.readouterr().out


def test_pieces_take_less_memory_for_the_same_gradient(monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 60)
    cells = pieces.compare(180, False, "NCA", turns=1).split(" | ")
    assert float(cells[4]) < float(cells[3]) and float(cells[-1].strip(" |")) < 1e-5
