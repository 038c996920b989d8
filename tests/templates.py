"""Chat templates in the manner of well-known families, written for the tests, and trajectories to render with them."""

import json
import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

#: Tools in the system's turn, calls as JSON in tags, results inside a user's turn; thinking is kept behind the last
#: question only, and the last answer has an empty block if it has none.
QWEN3 = """
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {%- set ns = namespace(listed='') %}
    {%- for tool in tools %}{% set ns.listed = ns.listed + '\\n' + tool | tojson %}{% endfor %}
    {{- turn('system', first + '\\n\\n# Tools\\n<tools>' + ns.listed + '\\n</tools>') }}
{%- elif first %}{{- turn('system', first) }}{% endif %}
{%- set last = namespace(question=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{- turn(m.role, m.content) }}
    {%- elif m.role == 'assistant' %}
        {%- set thought, text = m.reasoning_content or '', m.content %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if text or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

#: Tools in the first turn of the user's, or the system's; one call a turn, as bare JSON; results by `ipython`, as JSON.
LLAMA3 = """
{{- bos_token }}
{%- macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set in_user = tools_in_user_message if tools_in_user_message is defined else true %}
{%- macro listed() %}{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\\n\\n' }}{% endfor %}{% endmacro %}
{%- set has_system = messages[0].role == 'system' %}
{{- head('system') + ('Environment: ipython\\n' if tools else '') }}
{{- listed() if tools and not in_user }}
{{- (messages[0].content | trim if has_system else '') + '<|eot_id|>' }}
{%- set told = namespace(tools=false) %}
{%- for m in messages %}
    {%- if m.role == 'system' and loop.first %}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length > 1 %}{{ raise_exception('One call at a time, please') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- head('assistant') + ('<|python_tag|>' if not in_user else '') }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
        {{- '<|eom_id|>' if not in_user else '<|eot_id|>' }}
    {%- elif m.role == 'tool' %}{{- head('ipython') + (m.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- head(m.role) }}
        {%- if tools and in_user and m.role == 'user' and not told.tools %}
            {%- set told.tools = true %}{{- 'You may call these functions.\\n\\n' + listed() }}
        {%- endif %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{% endif %}
"""

#: Tools before the last turn of the user's, so that the prompt's rendering changes once another one follows.
MISTRAL = """
{{- bos_token }}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' if tools and loop.index0 == last.user }}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if not call.id or call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
            {{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool') }}{% endif %}
{%- endfor %}
"""

#: Keeps of an answer what stands behind its thinking, and opens the thinking for sampling. Knows calls, but no tools.
DEEPSEEK_R1 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'user' %}{{- '<User>' + m.content }}
    {%- elif m.role == 'assistant' %}{{- '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\\n' }}{% endif %}
"""

#: Channels; another token at the end of the conversation than inside of it; no thinking of earlier answers.
GPT_OSS = """
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- if tools or rest | length < messages | length %}
    {{- '<|start|>developer<|message|>' + (messages[0].content if messages[0].role == 'system' else '') }}
    {%- for tool in tools or [] %}
        {{- '\\n// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: {' }}
        {{- tool.function.parameters.properties | join(', ') + '}) => any;' }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name='') %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- set later = namespace(answer=false) %}
        {%- for n in rest[loop.index:] %}
            {%- if n.role == 'assistant' and not n.tool_calls %}{% set later.answer = true %}{% endif %}
        {%- endfor %}
        {%- if m.thinking and not later.answer %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- set called.name = m.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + called.name + '<|channel|>commentary json<|message|>' }}
        {{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- set ends = loop.last and not add_generation_prompt %}
        {%- if m.thinking and ends %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if ends else '<|end|>') }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (m.content | tojson) + '<|end|>' }}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""

#: Marks what the assistant writes, without the line end behind it.
CHATML_SPANS = """
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
        {{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) }}{% endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}{{- m.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

FAMILIES = {
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "deepseek_r1": DEEPSEEK_R1,
    "gpt_oss": GPT_OSS,
    "chatml_spans": CHATML_SPANS,
}

#: Special tokens of the families.
_SPECIAL = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> [INST] [/INST] [AVAILABLE_TOOLS] "
    "[/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <User> <Assistant> <|start|> <|end|> <|message|> "
    "<|channel|> <|call|> <|return|>"
).split()


def family_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens of all families, and keeps line ends together, as theirs do."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    words = pre_tokenizers.Split(
        Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    return tokenizer


def spaced_tokenizer(kind, template):
    """A tokenizer that puts a space before text, in one of the ways of the SentencePiece family."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "legacy":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        bpe.decoder = decoders.Sequence(strip)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=True)
        bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind)])
    texts = ["the capital of France is Paris. What is the name of this city? ASSISTANT: USER: Paris Rome <think>"] * 9
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    text_of_bytes = json.loads(bpe.to_str())
    text_of_bytes["added_tokens"] = text_of_bytes["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text_of_bytes)), bos_token="<s>", eos_token="</s>",
        chat_template=template,
    )  # fmt: skip


_EXPRESSION = {"type": "string", "description": "What to compute."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Computes an expression.",
            "parameters": {"type": "object", "properties": {"expression": _EXPRESSION}, "required": ["expression"]},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    """A turn of the user's."""
    return {"role": "user", "content": text}


def assistant(text: str, thought: str = "", calls: dict[str, str] | None = None) -> dict[str, Any]:
    """A turn of the assistant's, with its reasoning, and with calls of the calculator: ids and expressions."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        functions = {i: {"name": "calculator", "arguments": {"expression": e}} for i, e in calls.items()}
        message["tool_calls"] = [{"id": i, "type": "function", "function": f} for i, f in functions.items()]
    return message


def tool(text: str, call: str = "call00001") -> dict[str, Any]:
    """What the calculator returned."""
    return {"role": "tool", "content": text, "name": "calculator", "tool_call_id": call}


_CALL, _BOTH = {"call00001": "17 * 23"}, {"call00001": "17 * 23", "call00002": "4 + 4"}
TRAJECTORIES = {
    "answer": [assistant("It is 391.")],
    "reasoned": [assistant("It is 391.", "Twenty times that, less three times.")],
    "call": [assistant("", calls=_CALL), tool("391"), assistant("It is 391.")],
    "reasoned call": [
        assistant("", "Better to compute that.", _CALL), tool("391"), assistant("It is 391.", "The tool says so.")
    ],
    "two calls": [assistant("", calls=_BOTH), tool("391"), tool("8", "call00002"), assistant("It is 391, and 8.")],
    "user in between": [assistant("Which one?"), user("The first, of course."), assistant("It is 391.")],
    "reasoned, user in between": [
        assistant("Which one?", "Two were named."), user("The first."), assistant("It is 391.", "So the first.")
    ],
    "call, user, call": [
        assistant("", calls=_CALL), tool("391"), assistant("It is 391."), user("Sure?"),
        assistant("", calls={"call00003": "23 * 17"}), tool("391.0", "call00003"), assistant("Quite sure."),
    ],
    "ends with a call": [assistant("", calls=_CALL)],
}  # fmt: skip


#: What templates differ in. `{role}` is the turn's.
VARIANTS: dict[str, tuple[str, ...]] = {
    "head": (
        "<|im_start|>{role}\n", "<|{role}|>\n", "### {role}\n\n", "\n{role}:\n",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
    ),
    "end": ("<|im_end|>", "<|end_of_the_turn|>", "<|end|>", ""),
    "last_end": ("", "<|return|>", "and <|endoftext|>"),
    "tail": ("", "\n", "\n\n"),
    "results": ("own turn", "user's turn", "json"),
    "thinking": ("unknown", "kept", "in the last turn", "behind the last user"),
    "tools": ("system", "last user", "unknown"),
    "spans": ("", "text", "end", "turn"),
    "opens": ("", "", "<think>\n"),
}  # fmt: skip

_OF_VARIANTS = """
{%- macro head(role) %}{{ HEAD }}{% endmacro %}
{%- macro listed() %}{{ '<tools>' + (tools | tojson) + '</tools>' if tools else '' }}{% endmacro %}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- if tools and TOOLS == 'system' %}{{- head('system') + listed() + END + TAIL }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- BEGIN_TURN %}
        {{- head('assistant') }}
        {%- BEGIN %}
        {%- if m.reasoning_content and (THINKING == 'kept' or (THINKING == 'in the last turn' and loop.last)
            or (THINKING == 'behind the last user' and loop.index0 > last.user)) %}
            {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) }}{% endfor %}
        {%- FINISH_TEXT %}
        {{- LAST_END if loop.last and not add_generation_prompt else END }}
        {%- FINISH %}
        {{- TAIL }}
    {%- elif m.role == 'tool' and RESULTS == "user's turn" %}
        {{- head('user') if messages[loop.index0 - 1].role != 'tool' else '' }}
        {{- '<tool_response>' + m.content + '</tool_response>' }}
        {{- END + TAIL if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
    {%- elif m.role == 'tool' %}
        {{- head('tool') + (({'result': m.content} | tojson) if RESULTS == 'json' else m.content) + END + TAIL }}
    {%- else %}
        {{- head(m.role) + (listed() if TOOLS == 'last user' and loop.index0 == last.user else '') }}
        {{- m.content + END + TAIL }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') + OPENS }}{% endif %}
"""


def variant(head: str, end: str, last_end: str, spans: str, **others: str) -> str:
    """A chat template of these parts; see `VARIANTS`."""
    last_end = end + last_end.removeprefix("and ") if last_end.startswith("and") else last_end or end
    texts = {"LAST_END": last_end, "END": end, **{name.upper(): text for name, text in others.items()}}
    template = _OF_VARIANTS.replace("HEAD", " + role + ".join(repr(text) for text in head.split("{role}")))
    for name, text in texts.items():
        template = re.sub(rf"\b{name}\b", lambda _, text=text: repr(text), template)
    tags = {"BEGIN_TURN": spans == "turn", "BEGIN": spans in ("text", "end"), "FINISH_TEXT": spans == "text",
            "FINISH": spans in ("turn", "end")}  # fmt: skip
    for name, is_there in tags.items():
        tag = "generation" if name.startswith("BEGIN") else "endgeneration"
        template = template.replace("{%- " + name + " %}", "{%- " + tag + " %}" if is_there else "")
    return template
