"""Time and memory of preparing reward data: this project's reading, checking, tokenizing and report, and upstream's.

    python -m benchmarks.data                      100,000 rows of four responses, against upstream on the same text
    python -m benchmarks.data --rows 1000000 --only ours

Ours reads a JSON-lines file in list form (four responses of 200 tokens), applies the rules, tokenizes, and reports.
Upstream (`trl.DPOTrainer`) loads the same responses as two pairs a row and tokenizes them. Each runs in a process of
its own with an empty cache, and with as many processes as there are cores; the rate is in response tokens a second.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

MODEL = "models/SmolLM2-135M-Instruct"
WORDS = (
    "the of and to a in is that it was for on are with as his they be at one have this from or had by word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way about"
).split()
RESPONSES, RESPONSE_WORDS, PROMPT_WORDS = 4, 200, 80


def write_rows(folder: Path, rows: int) -> None:
    """Writes the same texts in list form and as pairs."""
    rng = random.Random(0)
    with open(folder / "list.jsonl", "w") as as_list, open(folder / "pairs.jsonl", "w") as as_pairs:
        for i in range(rows):
            prompt = [{"role": "user", "content": f"{i} " + " ".join(rng.choices(WORDS, k=PROMPT_WORDS))}]
            texts = [" ".join(rng.choices(WORDS, k=RESPONSE_WORDS)) for _ in range(RESPONSES)]
            scores = [round(rng.random(), 3) for _ in texts]
            as_list.write(json.dumps({"prompt": prompt, "responses": texts, "scores": scores}) + "\n")
            for better, worse in zip(texts[::2], texts[1::2], strict=True):
                chosen, rejected = ([{"role": "assistant", "content": text}] for text in (better, worse))
                as_pairs.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def prepare_ours(folder: Path, num_proc: int) -> int:
    """Reads, checks, tokenizes and reports; returns the response tokens."""
    from transformers import AutoTokenizer

    from alignment.data.load import DataConfig, load_groups
    from alignment.data.report import data_report, summary
    from trl_nca.loss_config import LossConfig
    from trl_nca.responses import tokenize_dataset

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = DataConfig(train_file=str(folder / "list.jsonl"))
    raw, counts = load_groups(config, control_tokens=tokenizer.all_special_tokens, num_proc=num_proc)
    rows, tokenized = tokenize_dataset(raw["train"], tokenizer, 1024, 512, num_proc=num_proc)
    report = data_report("train", config, counts["train"], tokenized, rows, LossConfig(alpha=0.1))
    print(summary("train", report), flush=True)
    return round(report["lengths"]["response"]["mean"] * report["responses"])


def prepare_upstream(folder: Path, num_proc: int) -> int:
    """What `trl.DPOTrainer` does with the pairs before it trains; returns the response tokens."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    args = DPOConfig(output_dir=str(folder / "out"), dataset_num_proc=num_proc, report_to="none", use_cpu=True)
    pairs = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    # The method needs nothing of a trainer that has rows in conversational form.
    rows = DPOTrainer._prepare_dataset(None, pairs, tokenizer, args, "train")
    lengths = rows.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(10_000)
    return sum(len(c.combine_chunks().flatten()) for table in lengths for c in table.columns)


SYSTEMS = {"ours": prepare_ours, "upstream": prepare_upstream}


def serve(pipe: Connection, system: str, folder: Path, num_proc: int) -> None:
    """A worker: one system, with a cache of its own; sends back seconds, tokens and the peaks of memory."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / f"cache-{system}")
    import trl  # noqa: F401  not counted: both need it

    start = time.perf_counter()
    tokens = SYSTEMS[system](folder, num_proc)
    seconds = time.perf_counter() - start
    unit = 1024 / 1e9
    own, children = (
        resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    pipe.send({"seconds": seconds, "tokens": tokens, "peak_gb": own, "peak_gb_of_a_child": children})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--only", choices=list(SYSTEMS))
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--output", default="benchmarks/results_data.json")
    options = parser.parse_args()
    context, results = mp.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.rows)
        for system in [options.only] if options.only else SYSTEMS:
            here, there = context.Pipe()
            worker = context.Process(target=serve, args=(there, system, folder, options.num_proc))
            worker.start()
            there.close()
            results[system] = result = here.recv()
            worker.join()
            print(
                f"{system}: {options.rows} rows in {result['seconds']:.0f} s, "
                f"{result['tokens'] / result['seconds']:.0f} response tokens/s; peak {result['peak_gb']:.2f} GB, "
                f"of a child {result['peak_gb_of_a_child']:.2f} GB",
                flush=True,
            )
    about = {"rows": options.rows, "num_proc": options.num_proc, "systems": results}
    Path(options.output).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
