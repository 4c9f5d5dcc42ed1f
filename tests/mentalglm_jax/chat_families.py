"""Small tokenizers that speak as GLM's relatives do: their parts, special tokens and chat templates around our own
2,546 byte-level tokens.

The templates of Qwen2.5 and SmolLM2 are the published ones (Apache-2.0, Alibaba Cloud and Hugging Face). Those of
Llama 3 are written anew from what they render.
"""

import json
from pathlib import Path

from mentalglm_jax.text.tokenizer import BUILTIN
from mentalglm_jax.text.tokenizer_files import SPLIT

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501 - as published
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HEADER = """\
{%- macro turn(role, text) -%}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' -}}
{%- endmacro -%}
{{- bos_token -}}
"""
_ANSWER = """\
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""
LLAMA = _HEADER + "{%- for one in messages %}{{ turn(one.role, one.content.strip()) }}{% endfor -%}\n" + _ANSWER
LLAMA_DATED = (
    _HEADER
    + """\
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}
{%- set today = date_string if date_string is defined else today -%}
{%- set asked = messages[0].content.strip() if messages[0].role == 'system' else '' -%}
{{- turn('system', 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ today ~ '\\n\\n' ~ asked) -}}
{%- for one in messages if one.role != 'system' %}{{ turn(one.role, one.content | trim) }}{% endfor -%}
"""
    + _ANSWER
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_EOT = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Special tokens, other added tokens, named tokens, template, what ends an answer by generation_config.json, parts.
FAMILIES = {
    "qwen": (_IM, ["<tool_call>"], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, QWEN,
             ["<|im_end|>", "<|endoftext|>"], "qwen"),
    "smollm": (_IM, [], {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
               "unk_token": "<|endoftext|>"}, SMOLLM, "<|im_end|>", "smollm"),
    "yi": (_IM, [], {"eos_token": "<|im_end|>"}, PLAIN, "<|im_end|>", "qwen"),
    "llama": (_EOT, [], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, LLAMA,
              ["<|end_of_text|>", "<|eot_id|>"], "llama"),
    "llama-dated": (_EOT, [], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, LLAMA_DATED,
                    ["<|end_of_text|>", "<|eot_id|>"], "llama"),
}  # fmt: skip
DEFAULTS = {
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "yi": None,
    "llama": None,
    "llama-dated": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
}


def write_family(directory: Path, name: str, **changes: object) -> Path:
    """The tokenizer files of a family; ``changes`` go into tokenizer_config.json."""
    special, others, named, template, ends, parts = FAMILIES[name]
    raw = json.loads((BUILTIN / "tokenizer.json").read_text("utf-8"))
    first = len(raw["model"]["vocab"])
    added = [*special, *others]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [
        {"id": first + place, "content": token, **flags, "special": token in special}
        for place, token in enumerate(added)
    ]
    split = SPLIT.replace(r"\p{N}{1,3}", r"\p{N}") if parts == "qwen" else SPLIT
    steps = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}, _BYTES]
    if parts == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}]
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    raw["normalizer"] = {"type": "NFC"} if parts == "qwen" else None
    raw["post_processor"] = _BYTES if parts != "smollm" else None
    if parts == "llama":
        bos = first + added.index("<|begin_of_text|>")
        text = {"Sequence": {"id": "A", "type_id": 0}}
        start = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
        raw["post_processor"] = {"type": "Sequence", "processors": [_BYTES, {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, text],
            "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [bos],
                                                     "tokens": ["<|begin_of_text|>"]}}}]}  # fmt: skip
        raw["model"]["ignore_merges"] = True
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named, **changes}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ids = [first + added.index(end) for end in ([ends] if isinstance(ends, str) else ends)]
    stated = {"eos_token_id": ids[0] if isinstance(ends, str) else ids}
    (directory / "generation_config.json").write_text(json.dumps(stated), "utf-8")
    return directory
