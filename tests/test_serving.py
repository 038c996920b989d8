"""Ollama's Modelfile: the chat template in Go's language says what the Jinja template says, and where to stop."""

import re
from pathlib import Path

import jinja2
import pytest
import yaml

from alignment.serving.modelfile import GGUF, modelfile, translate, write_modelfile
from tests.conftest import ROOT
from tests.tiny import CHATML, save_tiny_model, tiny_tokenizer
from trl_nca.rendering.messages import RefusedRow
from trl_nca.rendering.renderer import Renderer

#: In the manner of well-known families.
TEMPLATES = {
    "ChatML": CHATML,
    "a system text of its own": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "Llama-3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|' + m.role + '|>\n\n' + m.content | trim "
        "+ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
    ),
    "Gemma-2": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<' + m.role + '>\n' + m.content + '</>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<model>\n' }}{% endif %}"
    ),
    "Gemma-3": (
        "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + (s if loop.first else '') + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    ),
    "without system": CHATML.replace("in messages %}", "in messages if m.role != 'system' %}"),
    "braces": "{% for m in messages %}{{ '{' ~ '{' + m.role + '}' ~ '}' + m.content }}{% endfor %}",
}
#: Actions of Go's template language that are used, in Jinja.
_IN_JINJA = {
    "$first := true": "{% set ns = namespace(first=true) %}", "$first = false": "{% set ns.first = false %}",
    "range .Messages": "{% for m in messages %}", 'if eq .Role "user"': "{% if m.role == 'user' %}",
    'else if eq .Role "assistant"': "{% elif m.role == 'assistant' %}", "if $first": "{% if ns.first %}",
    "if $.System": "{% if system %}", "else": "{% else %}", ".Content": "{{ m.content }}", "$.System": "{{ system }}",
    '"{{"': "{{ '{{' }}",
}  # fmt: skip


def as_jinja(go):
    """A template of Go's language, of the actions above alone, in Jinja."""
    opened, written = [], []
    for text, action in re.findall(r"(.*?)(?:\{\{ (\"\{\{\"|[^{}]*?) \}\}|\Z)", go, flags=re.DOTALL):
        written.append(text)
        if action.split(" ")[0] in ("range", "if"):
            opened.append("for" if action.startswith("range") else "if")
        if action:
            written.append(f"{{% end{opened.pop()} %}}" if action == "end" else _IN_JINJA[action])
    assert not opened
    return jinja2.Environment(keep_trailing_newline=True).from_string("".join(written))


def conversation(roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"What? {i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau", "uauauau"])
def test_ollama_is_told_what_the_chat_template_says(name, roles):
    tokenizer, messages = tiny_tokenizer(TEMPLATES[name]), conversation(roles)
    try:
        expected = Renderer(tokenizer).render(messages, add_generation_prompt=True)
    except RefusedRow:
        return
    system = messages[0]["content"] if roles[0] == "s" else ""
    assert as_jinja(translate(tokenizer).as_go()).render(messages=messages, system=system) == expected


def test_a_template_that_goes_by_more_than_turns_is_left_to_the_user():
    last = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ('' if loop.last else '!') }}{% endfor %}"
    system_last = (
        "{% for m in messages if m.role != 'system' %}{{ '[' + m.role + ']' }}{% if loop.last and messages[0].role == "
        "'system' %}{{ messages[0].content }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert translate(tiny_tokenizer(last)) is not None
    tokenizer = tiny_tokenizer(system_last)
    assert translate(tokenizer) is None
    text = modelfile(tokenizer, [])
    assert "cannot be said" in text
    assert "TEMPLATE " not in text.replace("a TEMPLATE", "")
    assert 'TEMPLATE "{{ .Prompt }}"' in modelfile(tiny_tokenizer(None), [])


def test_the_bos_that_ollama_adds_is_left_out():
    tokenizer = tiny_tokenizer(TEMPLATES["Mistral"])
    assert translate(tokenizer).before_user == "<|im_start|>[INST] "
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert translate(tokenizer).before_user == "[INST] "


def test_the_modelfile_of_a_folder(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    text = write_modelfile(folder).read_text()
    assert (tmp_path / "model" / "Modelfile").read_text() == text
    assert "\nFROM ./model.gguf\n" in text
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')


def test_the_page_on_serving_names_what_is_here(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text().replace("\\\n   ", "")
    recipe = yaml.safe_load((ROOT / "yamls" / "reward_cpu.yaml").read_text())
    merged = re.search(r"merge\.py (\S+) --output (\S+) --modelfile", page)
    assert merged[1] == recipe["output_dir"]
    assert f"vllm serve {merged[2]} " in page
    base, rank, adapter, template = re.search(
        r"vllm serve (\S+) --enable-lora --max-lora-rank (\d+) +--lora-modules \w+=(\S+) --chat-template (\S+)", page
    ).groups()
    assert (base, adapter) == (recipe["model_name_or_path"], recipe["output_dir"])
    assert int(rank) >= recipe["lora_r"]
    assert template == f"{adapter}/chat_template.jinja"
    assert f"--outfile ../{merged[2]}/{GGUF}" in page
    assert f"ollama create reward_cpu -f {merged[2]}/Modelfile" in page
    folder = Path(save_tiny_model(tmp_path / "full"))
    exec(re.search(r"python -c '(.*)'", page)[1].replace("runs/reward_full", str(folder)), {})
    for name in set(re.findall(r"`(\w+\.(?:json|jinja)|Modelfile)`", page)):
        assert (folder / name).is_file(), name
