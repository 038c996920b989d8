"""What the tests share: offline, one thread a process, where the shared data lies, and skips that say why."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.forked import draw_nothing, serve, start, write_client

# Tiny models run fastest on one thread, and a second one makes every small operation wait when the cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Data sets built by a test never come from an earlier run's cache. Set before anything imports datasets.
_CACHE = tempfile.TemporaryDirectory(prefix="datasets-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason="models/SmolLM2-135M-Instruct is not here: make setup")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder with golden values is not here")


gc.disable()  # while modules are imported: they make no garbage


def pytest_collection_finish() -> None:
    """What was imported is no garbage: every trainer collects all else, and would look at each import again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a tiny random Llama with its tokenizer."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def saving_recipe(tmp_path_factory, tiny_model) -> Path:
    """Path of a recipe of forty steps with dropout, logged every third, saved every second."""
    from tests.trainers import reward_rows

    folder = tmp_path_factory.mktemp("saving")
    for name, n in (("train", 40), ("eval", 4)):
        rows = reward_rows(n)
        if name == "eval":
            rows = [row | {"prompt": [{"role": "user", "content": f"Held out {i}"}]} for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": tiny_model, "train_file": f"{folder}/train.jsonl", "eval_file": f"{folder}/eval.jsonl",
        "output_dir": f"{folder}/whole", "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.2, "disable_dropout": False, "beta": 0.1, "alpha": 0.3, "learning_rate": 1e-2,
        "max_steps": 40, "global_batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 3,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 20,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def whole_run(saving_recipe) -> Path:
    """Output folder of the run of that recipe that nothing happens to."""
    from nca_trainer import NCATrainer
    from run_reward import align

    align([str(saving_recipe)], NCATrainer)
    return saving_recipe.parent / "whole"


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory) -> Iterator[str]:
    """In place of `sys.executable`: runs a script in a process that has imported everything."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:  # a socket's path must be short
        address = f"{folder}/socket"
        server = start(serve, address)
        while not Path(address).exists():
            assert server.is_alive()
            time.sleep(0.01)
        yield write_client(Path(folder) / "python", address)
        server.terminate()


REPORTS = ("tests.test_html_report", "tests.test_groups", "tests.test_report_callback", "tests.test_notebook")


@pytest.fixture(autouse=True)
def _no_reports(request, monkeypatch):
    """But in the tests of reports."""
    if request.module.__name__ not in REPORTS:
        draw_nothing(monkeypatch.setattr)
