"""Adapters merged into their base: the same logits, in a model that anyone can use, with a card that says how."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaForCausalLM,
)

from alignment import merge
from alignment.errors import UserError
from alignment.merge import merge_adapter
from alignment.report.card import CITATION
from tests.scripts import script
from tests.tiny import CHATML, save_tiny_model, tiny_config, tiny_tokenizer
from trl_nca.layers import keep_4bit_weights

IDS = torch.arange(3, 40)[None]


def save_adapter(base, folder, **lora):
    """Writes an adapter that changes what the base says, with its tokenizer."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **lora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_merged_is_the_adapter_on_its_base(tiny_model, tmp_path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    assert merge_adapter(adapter, str(tmp_path / "merged")) < 1e-5
    base, merged = (AutoModelForCausalLM.from_pretrained(name) for name in (tiny_model, tmp_path / "merged"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        at_base, at_merged = base(ids).logits, merged(ids).logits
        at_adapter = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert torch.allclose(at_merged, at_adapter, atol=1e-5)
    assert not torch.allclose(at_base, at_adapter, atol=0.1)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what is shown here
def test_a_merge_that_changes_the_model_is_refused(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match="merged, it gives other logits"):
        merge_adapter(adapter, str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_merge_script(tiny_model, tmp_path, monkeypatch, capsys):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", target_modules=["v_proj"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    (tmp_path / "empty").mkdir()
    assert script(monkeypatch, "merge.py", adapter, "--output", tmp_path / "full") == 2
    assert "full is not empty; name a new folder" in capsys.readouterr().err
    assert script(monkeypatch, "merge.py", tiny_model, "--output", tmp_path / "new") == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert script(monkeypatch, "merge.py", adapter, "--output", tmp_path / "empty") == 0
    assert (tmp_path / "empty" / "model.safetensors").exists()
    assert not (tmp_path / "new").exists()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_adapter_of_a_4_bit_base_is_merged_into_what_it_was_trained_on(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    (tmp_path / "adapter" / "recipe.yaml").write_text("load_in_4bit: true\nbnb_4bit_quant_type: nf4\n")
    assert merge_adapter(adapter, str(tmp_path / "merged")) < 1e-3
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    trained_on = AutoModelForCausalLM.from_pretrained(base, quantization_config=in_4_bits, dtype=torch.float32)
    keep_4bit_weights(trained_on)
    at_adapter = logits(PeftModel.from_pretrained(trained_on, adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    error = (logits(merged) - at_adapter).abs().max()
    assert error < 1e-3
    merge_adapter(adapter, str(tmp_path / "full"), quantized=False)
    at_full = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
    assert (at_full - at_adapter).abs().max() > 20 * error, "the base in 4 bits is another model"


def test_weights_can_be_kept_in_fewer_bits(tiny_model, tmp_path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    assert 1e-5 < merge_adapter(adapter, str(tmp_path / "merged"), dtype="bfloat16") < 5e-2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_the_merged_model_stops_where_the_template_does(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    GenerationConfig(eos_token_id=7).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it, with a template that ends turns otherwise
    tokenizer.save_pretrained(adapter)
    merge_adapter(adapter, str(tmp_path / "merged"))
    generation = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert generation.eos_token_id == [0, 2, 7]
    read_by_others = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert read_by_others["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert generation.pad_token_id == 0


def test_the_card_says_what_the_run_said(tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(tiny_model, adapter, target_modules=["q_proj"])
    (adapter / "figures").mkdir()
    (adapter / "figures" / "rewards.png").write_bytes(b"png")
    (adapter / "recipe.yaml").write_text("loss_type: NCA\nbeta: 0.25\n")
    report = {"rows_kept": 9, "rows_in": 10, "responses": 31, "dropped_by_reason": {"empty_prompt": 1}}
    (adapter / "data_report.json").write_text(json.dumps(report))
    samples = {"score_before": 0.25, "score_after": 0.5, "score_difference": 0.25,
               "score_difference_interval": [0.125, 0.375]}  # fmt: skip
    (adapter / "eval_results.json").write_text(json.dumps({"eval": {"eval_loss": 1.25}, "samples": samples}))
    merge_adapter(str(adapter), str(tmp_path / "merged"))
    card = (tmp_path / "merged" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in head, "a folder is no name that the Hub knows"
    assert "`tiny-llama`, aligned" in card, "nobody else knows the folder"
    assert head["library_name"] == "transformers"
    assert card.split("---")[2].strip().startswith("# merged")
    for line in ("by the NCA loss", "beta: 0.25", "| held-out loss | 1.2500 |", "| held-out score | 0.250 -> 0.500 |",
                 "| its difference (95 %) | 0.250 [0.125, 0.375] |", "9 of 10 rows kept (dropped: empty_prompt 1)",
                 "](figures/rewards.png)", CITATION):  # fmt: skip
        assert line in card
    assert (tmp_path / "merged" / "figures" / "rewards.png").read_bytes() == b"png"


def test_a_merged_model_is_uploaded_when_asked(tiny_model, tmp_path, monkeypatch, capsys):
    class Hub:
        def create_repo(self, name, private, exist_ok):
            assert (name, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, repo_id, folder_path):
            return f"uploaded {folder_path} to {repo_id}"

    monkeypatch.setattr(merge, "HfApi", Hub)
    adapter = save_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    assert script(monkeypatch, "merge.py", adapter, "--output", tmp_path / "a", "--push_to_hub", "me/model") == 0
    assert f"uploaded {tmp_path}/a to me/model" in capsys.readouterr().out
    monkeypatch.undo()
    assert script(monkeypatch, "merge.py", adapter, "--output", tmp_path / "b", "--push_to_hub", "me/model") == 2
    assert f"{tmp_path}/b is written" in capsys.readouterr().err
