"""What the tests share: offline, one thread a process, where the shared data lies, and skips that say why."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a tiny random Llama with its tokenizer."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


def draw_nothing(replace: Callable[..., None] = setattr) -> None:
    """Runs write no report from here on: drawing one takes longer than a tiny run."""
    for module in ("alignment.report.callback", "alignment.job"):
        if module in sys.modules:
            replace(sys.modules[module], "write_report", lambda *args: None)


@pytest.fixture(autouse=True)
def _no_reports(request, monkeypatch):
    """But in the tests of reports."""
    if request.module.__name__ != "tests.test_html_report":
        draw_nothing(monkeypatch.setattr)
