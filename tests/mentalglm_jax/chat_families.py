"""Small tokenizers that speak as GLM's relatives do: their parts, special tokens and chat templates around our own
2,546 byte-level tokens.

The templates of Qwen2.5 and SmolLM2 are the published ones (Apache-2.0, Alibaba Cloud and Hugging Face). Those of
Llama 2 and 3 and of Mistral are written anew from what they render. Llama 2 and Mistral 7B have a SentencePiece
vocabulary, made here of a few clauses.
"""

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mentalglm_jax.data.synthetic import load_phrases
from mentalglm_jax.text.tokenizer import BUILTIN
from mentalglm_jax.text.tokenizer_files import SPLIT, TEKKEN_SPLIT

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
_ALTERNATE = """\
{%- set asked = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- for one in asked -%}
    {%- if (one.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no turns') }}{% endif -%}
{%- endfor -%}
"""
LLAMA2 = (
    _ALTERNATE
    + """\
{%- for one in asked -%}
    {%- set said = one.content -%}
    {%- if loop.first and system is not none -%}
        {%- set said = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ said -%}
    {%- endif -%}
    {%- if one.role == 'user' %}{{ bos_token ~ '[INST] ' ~ said.strip() ~ ' [/INST]' }}
    {%- else %}{{ ' ' ~ said.strip() ~ ' ' ~ eos_token }}{% endif -%}
{%- endfor -%}
"""
)
# 7B v0.2: a space before [INST], the system's words before the first question; v0.3 and Nemo: before the last.
MISTRAL2 = (
    _ALTERNATE
    + """\
{{- bos_token -}}
{%- for one in asked -%}
    {%- set said = system ~ '\\n\\n' ~ one.content if loop.first and system is not none else one.content -%}
    {%- if one.role == 'user' %}{{ ' [INST] ' ~ said ~ ' [/INST]' }}{% else %}{{ ' ' ~ said ~ eos_token }}{% endif -%}
{%- endfor -%}
"""
)
_LAST = (
    _ALTERNATE
    + """\
{{- bos_token -}}
{%- set last = (asked | selectattr('role', 'equalto', 'user') | list)[-1] -%}
{%- for one in asked -%}
    {%- set said = system ~ '\\n\\n' ~ one.content if one is sameas last and system is not none else one.content -%}
    {%- if one.role == 'user' %}{{ '[INST]@' ~ said ~ '[/INST]' }}{% else %}{{ '@' ~ said ~ eos_token }}{% endif -%}
{%- endfor -%}
"""
)
MISTRAL3 = _LAST.replace("@' ~ said ~ eos_token", " ' ~ said | trim ~ eos_token").replace("@", " ")
NEMO = _LAST.replace("@", "")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_S, _INST = ["<unk>", "<s>", "</s>"], ["[INST]", "[/INST]"]
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
    "llama2": (_S, [], {"bos_token": "<s>", "eos_token": "</s>"}, LLAMA2, "</s>", "prepend"),
    "mistral2": (_S, [], {"bos_token": "<s>", "eos_token": "</s>"}, MISTRAL2, "</s>", "prepend"),
    "mistral3": ([*_S, *_INST], [], {"bos_token": "<s>", "eos_token": "</s>"}, MISTRAL3, "</s>", "first"),
    "nemo": ([*_S, *_INST], [], {"bos_token": "<s>", "eos_token": "</s>"}, NEMO, "</s>", "tekken"),
}  # fmt: skip
ROWS = {"qwen": "chatml", "smollm": "chatml", "yi": "chatml", "llama": "llama3", "llama-dated": "llama3",
        "llama2": "inst", "mistral2": "inst", "mistral3": "mistral", "nemo": "mistral"}  # fmt: skip
DEFAULTS = {
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "yi": None,
    "llama": None,
    "llama2": None,
    "mistral2": None,
    "mistral3": None,
    "nemo": None,
    "llama-dated": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
}


def write_family(directory: Path, name: str, **changes: object) -> Path:
    """The tokenizer files of a family; ``changes`` go into tokenizer_config.json."""
    special, others, named, template, ends, parts = FAMILIES[name]
    spaces = {"prepend": "Prepend", "first": "Metaspace"}.get(parts)
    raw = json.loads((BUILTIN / "tokenizer.json").read_text("utf-8")) if spaces is None else sentencepiece()
    first = len(raw["model"]["vocab"])
    added = [*special, *others]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [
        {"id": first + place, "content": token, **flags, "special": token in special}
        for place, token in enumerate(added)
    ]
    split = {"qwen": SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"), "tekken": TEKKEN_SPLIT}.get(parts, SPLIT)
    steps = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}, _BYTES]
    if parts == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}]
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    raw["normalizer"] = {"type": "NFC"} if parts == "qwen" else None
    raw["post_processor"] = _BYTES if parts != "smollm" else None
    if spaces is not None:
        bar = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = [{"type": "Prepend", "prepend": "▁"}, bar]
        raw["normalizer"] = {"type": "Sequence", "normalizers": steps} if spaces == "Prepend" else None
        raw["pre_tokenizer"] = None if spaces == "Prepend" else {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}  # fmt: skip
        raw["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
        raw["post_processor"] = None
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


@functools.cache
def _pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges of a few clauses, spaces as ▁ at the beginning of words and by themselves, and two in a row."""
    clauses = [text for language in ("en", "zh") for text in _texts(load_phrases(language))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=["▁", *"[]/INST<>Y"])
    backend.train_from_iterator(clauses, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return ("▁▁", *model["vocab"]), (("▁", "▁"), *merges)


def _texts(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [text for part in parts for text in _texts(part)]


def sentencepiece() -> dict[str, Any]:
    """The beginning of a ``tokenizer.json`` of SentencePiece's kind: bytes, then pieces; special tokens come after."""
    tokens, merges = _pieces()
    vocab = {token: place for place, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *tokens])}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": vocab, "merges": [list(pair) for pair in merges]}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "model": model}
