"""Attacks on ``probes`` through model directories, adapters and tokenizers."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.errors import ProbeInputError, ProbeWarning
from probes.models.adapter import with_adapter
from probes.models.load import load_model
from probes.models.tokenizer import load_tokenizer
from tests.hostile.attack import refused
from tests.hostile.probes_files import clean, edit, place, probe  # noqa: F401

DEEP = "[" * 5000 + "]" * 5000


def _link(file: Path, target: Path) -> None:
    shutil.move(file, target)
    file.symlink_to(target)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _tensor(file: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def _sharded(model: Path, name: str = "model-1.safetensors", listed: str | None = None) -> None:
    (model / "model.safetensors").rename(model / Path(name).name)
    keys = load_file(model / Path(name).name)
    index = {"weight_map": dict.fromkeys(keys, listed or name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def _gguf(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()
    (model / "model-q4.gguf").write_bytes(b"GGUF")


def _header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header)


MODELS = {
    "config.json is a FIFO": (lambda m: _fifo(m / "config.json"), r"config\.json: is not a plain file"),
    "weights are a FIFO": (lambda m: _fifo(m / "model.safetensors"), r"model\.safetensors: is not a plain file"),
    "weights link outside": (
        lambda m: _link(m / "model.safetensors", m.parent / "elsewhere"), r"is a link to a file outside"),
    "config links outside": (lambda m: _link(m / "config.json", m.parent / "c"), r"is a link to a file outside"),
    "config links to a device": (
        lambda m: ((m / "config.json").unlink(), (m / "config.json").symlink_to("/dev/zero")), r"link to a file outs"),
    "pickled weights only": (_pickled, r"only pickled weights \(pytorch_model\.bin\)"),
    "index names ../": (lambda m: _sharded(m, listed="../model-1.safetensors"), r"outside the directory"),
    "index names a pickle": (lambda m: _sharded(m, "w.bin"), r"w\.bin is no safetensors file"),
    "index holds numbers": (
        lambda m: (_sharded(m), edit(m / "model.safetensors.index.json", weight_map={"a": 1})), r"weight_map must map"),
    "index lists what is not there": (
        lambda m: (_sharded(m), edit(m / "model.safetensors.index.json", weight_map={"a": "model-1.safetensors"})),
        r"does not match its shards"),
    "header of 2^60 bytes": (
        lambda m: (m / "model.safetensors").write_bytes((2**60).to_bytes(8, "little")), r"header of \d+ bytes"),
    "header is deep": (lambda m: _header(m / "model.safetensors", DEEP.encode()), r"not a readable safetensors file"),
    "header names a tensor twice": (
        lambda m: _header(m / "model.safetensors", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}'),
        r"the key 'a' stands more than once"),
    "header promises more than the file": (
        lambda m: _header(m / "model.safetensors", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
        r"not a readable safetensors file"),
    "config is deep": (lambda m: (m / "config.json").write_text('{"a":' + DEEP + "}"), r"config\.json: .*levels deep"),
    "config holds NaN": (lambda m: (m / "config.json").write_text('{"a": NaN}'), r"config\.json: not JSON: NaN"),
    "config holds 1e999": (lambda m: (m / "config.json").write_text('{"a": 1e999}'), r"config\.json: .*infinite"),
    "config holds 5000 digits": (
        lambda m: (m / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), r"an integer of 5000 digits"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), r"a JSON list, not an object"),
    "config is UTF-16": (lambda m: (m / "config.json").write_bytes('{"a": 1}'.encode("utf-16")), r"not UTF-8"),
    "config has half a pair": (lambda m: (m / "config.json").write_text('{"a": "\\ud800"}'), r"half a surrogate pair"),
    "as many layers as an extent": (
        lambda m: edit(m / "config.json", num_hidden_layers=300), r"num_hidden_layers: must be a number .* to 64,"),
    "10^12 dense layers": (
        lambda m: edit(m / "config.json", first_k_dense_replace=10**12), r"first_k_dense_replace: must be a number"),
    "10^12 cycles": (lambda m: edit(m / "config.json", H_cycles=10**12), r"H_cycles: must be a number from .* to 64,"),
    "10^9 kinds of attention": (
        lambda m: edit(m / "config.json", attention_types=[[["global", "local"], 10**9]]),
        r"attention_types: stands for more than 64 layers"),
    "10^9 layers": (lambda m: edit(m / "config.json", num_hidden_layers=10**9), r"num_hidden_layers: must be a number"),
    "10^9 heads": (lambda m: edit(m / "config.json", num_attention_heads=10**9), r"num_attention_heads: must be"),
    "a far larger model": (lambda m: edit(m / "config.json", intermediate_size=10**8), r"the files hold [\d,]+$"),
    "eos 10^12": (lambda m: edit(m / "config.json", eos_token_id=10**12), r"eos_token_id: must be a token id"),
    "eos 10^12 to generate": (
        lambda m: edit(m / "generation_config.json", eos_token_id=[10**12]), r"eos_token_id: must be a token id"),
    "other weight files by name": (
        lambda m: edit(m / "config.json", transformers_weights="../evil.safetensors"), r"names other files"),
    "attention code from the Hub": (
        lambda m: edit(m / "config.json", _attn_implementation="evil/kernel"), r"names code on the Hub"),
    "an adapter in place of a model": (
        lambda m: shutil.copy(m.parent / "adapter" / "adapter_config.json", m), r"is a PEFT adapter .*--adapter"),
    "a weight twice, once more within the model": (
        lambda m: _tensor(m / "model.safetensors", **{"model.model.norm.weight": torch.full((64,), 7.0)}),
        r"model\.model\.norm\.weight and model\.norm\.weight are one weight of this model"),
    "a weight twice, once without the model": (
        lambda m: _tensor(m / "model.safetensors", **{"norm.weight": torch.full((64,), 7.0)}),
        r"norm\.weight are one weight of this model"),
    "a weight of whole numbers": (
        lambda m: _tensor(m / "model.safetensors", **{"model.norm.weight": torch.full((64,), 7)}),
        r"model\.norm\.weight holds I64, which are no weights"),
    "GGUF": (_gguf, r"a GGUF directory"),
    "bitsandbytes": (
        lambda m: edit(m / "config.json", quantization_config={"load_in_4bit": True}), r"quantised .*bitsandbytes"),
    "GPTQ": (lambda m: edit(m / "config.json", quantization_config={"quant_method": "gptq"}), r"quantised .*GPTQ"),
    "AWQ": (lambda m: edit(m / "config.json", quantization_config={"quant_method": "awq"}), r"quantised .*AWQ"),
    "FP8": (lambda m: edit(m / "config.json", quantization_config={"quant_method": "fp8"}), r"quantised .*FP8"),
    "FP8 tensors unsaid": (
        lambda m: _tensor(m / "model.safetensors", x=torch.zeros(2, dtype=torch.float8_e4m3fn)), r"quantised .*FP8"),
    "GGUF in place of a directory": (lambda m: (shutil.rmtree(m), m.write_bytes(b"GGUF")), r"a GGUF file .*original"),
    "MLX": (lambda m: edit(m / "config.json", quantization={"group_size": 64, "bits": 4}), r"quantised .*MLX"),
    "GPTQ of a vision model": (
        lambda m: edit(m / "config.json", text_config={"quantization_config": {"quant_method": "gptq"}}), r"GPTQ"),
    "GPTQ tensors unsaid": (
        lambda m: _tensor(m / "model.safetensors", **{"model.x.qweight": torch.zeros(2, dtype=torch.int32)}),
        r"quantised checkpoint \(tensor model.x.qweight\)"),
    "GPTQ of old": (lambda m: (m / "quantize_config.json").write_text("{}"), r"quantised .*quantize_config.json"),
    "no such directory": (lambda m: shutil.rmtree(m), r"no such directory"),
    "a file in place of a directory": (lambda m: (shutil.rmtree(m), m.write_text("x")), r"is a file"),
}  # fmt: skip


@pytest.mark.parametrize("attack", MODELS)
def test_a_model_directory(attack, place, capsys):  # noqa: F811
    damage, says = MODELS[attack]
    damage(place / "model")
    refused(probe(place, capsys), says)
    assert not (place / "out").exists()


def test_code_beside_the_weights_is_never_run(place, capsys):  # noqa: F811
    model, mark = place / "model", place / "ran"
    evil = f"open({str(mark)!r}, 'w')\n"
    (model / "custom_generate").mkdir()
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (model / name).write_text(evil)
    code = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(model / "config.json", auto_map=code)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert probe(place, capsys).code == 0
    assert not mark.exists()


def test_the_hub_cache_layout_is_read(place):  # noqa: F811
    blobs, snapshot = place / "hub" / "blobs", place / "hub" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (place / "model").iterdir():
        shutil.move(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    load_model(snapshot)
    load_tokenizer(snapshot)


def _adapter(**changes):
    return lambda a: edit(a / "adapter_config.json", **changes)


def _raw(text):
    return lambda a: (a / "adapter_config.json").write_text(text)


ADAPTERS = {
    "lora_alpha NaN": (_raw('{"peft_type": "LORA", "lora_alpha": NaN}'), r"adapter_config\.json: not JSON: NaN"),
    "lora_alpha 1e39": (_adapter(lora_alpha=1e39), r"lora_alpha: must be a number from 0"),
    "lora_alpha text": (_adapter(lora_alpha="16"), r"lora_alpha: must be a number"),
    "alpha_pattern NaN": (_raw('{"alpha_pattern": {"q_proj": NaN}}'), r"not JSON: NaN"),
    "alpha_pattern 1e39": (_adapter(alpha_pattern={"q_proj": 1e39}), r"alpha_pattern: q_proj: must be a number"),
    "rank 10^9": (_adapter(r=10**9), r"r: must be a number from 1"),
    "rank 60000": (_adapter(r=60000), r"says rank 60000 .* the file has 4"),
    "rank 4.5": (_adapter(r=4.5), r"r: must be a whole number"),
    "rank_pattern 10^9": (_adapter(rank_pattern={"q_proj": 10**9}), r"rank_pattern: q_proj: must be a number"),
    "rank_pattern beyond the file": (_adapter(rank_pattern={"k_proj": 60000}), r"the largest in the file is 4"),
    "target_modules that never ends": (_adapter(target_modules=r"(\w+\.?)+\1x"), r"bounded time"),
    "target_modules looks around": (_adapter(target_modules=r"(?!x)(\w+\.?)+"), r"list the module names"),
    "target_modules does not compile": (_adapter(target_modules="(q_proj"), r"no regular expression"),
    "target_modules matches nothing": (_adapter(target_modules="nothing"), r"matches no module"),
    "alpha_pattern (?i)": (_adapter(alpha_pattern={"(?i)Q_PROJ": 4}), r"alpha_pattern.*no regular expression"),
    "rank_pattern does not compile": (_adapter(rank_pattern={"(": 4}), r"rank_pattern.*no regular expression"),
    "alpha_pattern of two expressions": (_adapter(alpha_pattern={"model)|(z": 4}), r"alpha_pattern.*no regular expr"),
    "rank_pattern of two expressions": (_adapter(rank_pattern={"model)|(z": 4}), r"rank_pattern.*no regular expr"),
    "modules_to_save is a pattern": (_adapter(modules_to_save=["(a+)+"]), r"modules_to_save: must hold module names"),
    "layers_pattern is a pattern": (_adapter(layers_pattern="(a+)+"), r"layers_pattern: must hold module names"),
    "layers_to_transform text": (_adapter(layers_to_transform=["x"]), r"layers_to_transform: must be a list of whole"),
    "an import by name": (_adapter(megatron_config={"a": 1}, megatron_core="os"), r"not supported: megatron_config"),
    "replicated layers": (_adapter(layer_replication=[[0, 2]] * 9), r"not supported: layer_replication"),
    "a key from the future": (_adapter(use_magic=True), r"not supported: use_magic"),
    "for another program": (_adapter(task_type="for vLLM only"), r"task_type: none that PEFT knows"),
    "another kind of adapter": (_adapter(peft_type="PROMPT_TUNING"), r"only LORA adapters"),
    "endless SVD": (_adapter(init_lora_weights="pissa_niter_999999999"), r"init_lora_weights"),
    "deep": (_raw('{"a":' + DEEP + "}"), r"levels deep"),
    "5000 digits": (_raw('{"r": ' + "9" * 5000 + "}"), r"an integer of 5000 digits"),
    "config is a FIFO": (lambda a: _fifo(a / "adapter_config.json"), r"is not a plain file"),
    "weights link outside": (
        lambda a: _link(a / "adapter_model.safetensors", a.parent / "w"), r"is a link to a file outside"),
    "pickled": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), r"only pickles are there"),
    "NaN in B": (
        lambda a: save_file({k: v * torch.nan if "layers.1.mlp.down_proj.lora_B" in k else v
                             for k, v in load_file(a / "adapter_model.safetensors").items()},
                            a / "adapter_model.safetensors"), r"NaN or infinity in"),
    "rope_theta 1e400": (
        lambda a: save_file(load_file(a / "adapter_model.safetensors"), a / "adapter_model.safetensors",
                            metadata={"rope_theta": "1e400"}), r"rope_theta: must be a number"),
    "no directory": (lambda a: shutil.rmtree(a), r"no such adapter directory"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ADAPTERS)
def test_an_adapter(attack, place, capsys):  # noqa: F811
    damage, says = ADAPTERS[attack]
    damage(place / "adapter")
    refused(probe(place, capsys, adapter=True), says)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 80, 9, 33, 12]])).logits


@pytest.mark.parametrize(
    "change",
    [
        _adapter(r=4.0),
        _adapter(lora_dtype=None, lorap_emb_lr=1e-6, lorap_lr_ratio=16.0),
        _adapter(target_modules=r".*\.(q_proj|o_proj|gate_up_proj|down_proj)"),
        _adapter(rank_pattern={r"layers\.\d+\.self_attn\.q_proj": 4}),
        lambda a: _tensor(
            a / "adapter_model.safetensors",
            **{"base_model.model.model.embed_tokens.weight":
               load_file(a.parent / "model" / "model.safetensors")["model.embed_tokens.weight"]},
        ),
        lambda a: _tensor(
            a / "adapter_model.safetensors",
            **{"base_model.model.lm_head.base_layer.weight":
               load_file(a.parent / "model" / "model.safetensors")["lm_head.weight"]},
        ),
    ],
    ids=["r is 4.0", "ms-swift 2", "an expression", "a rank_pattern", "save_embedding_layers", "lm_head.base_layer"],
)  # fmt: skip
def test_files_of_other_trainers_compute_the_same(change, place):  # noqa: F811
    expected = _logits(load_model(place / "model", place / "adapter")[0])
    change(place / "adapter")
    assert torch.equal(_logits(load_model(place / "model", place / "adapter")[0]), expected)


def test_biases_that_peft_0_13_lost_are_said(place):  # noqa: F811
    expected = _logits(load_model(place / "model", place / "adapter")[0])
    edit(place / "adapter" / "adapter_config.json", bias="lora_only")
    with pytest.warns(ProbeWarning, match="the base's are used"):
        model = load_model(place / "model", place / "adapter")[0]
    assert torch.equal(_logits(model), expected)


def test_embeddings_that_differ_from_the_base_are_refused(place, capsys):  # noqa: F811
    weight = load_file(place / "model" / "model.safetensors")["model.embed_tokens.weight"] + 1
    _tensor(place / "adapter" / "adapter_model.safetensors", **{"base_model.model.model.embed_tokens.weight": weight})
    refused(probe(place, capsys, adapter=True), r"embed_tokens\.weight differs from this model's")


def test_names_from_an_expression_are_those_peft_would_take(place):  # noqa: F811
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    edit(place / "adapter" / "adapter_config.json", target_modules=r".*\.(q|o|gate_up|down)_proj")
    wrapped, keys = with_adapter(model, place / "adapter")
    assert keys == {"missing_keys": [], "unexpected_keys": []}
    assert all("_proj" in name for name in wrapped.peft_config["default"].target_modules)


def _charsmap(units: np.ndarray, texts: bytes) -> str:
    return base64.b64encode((4 * len(units)).to_bytes(4, "little") + units.astype("<u4").tobytes() + texts).decode()


def _normaliser(table: str) -> dict[str, object]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}


def _units(**changes: int) -> np.ndarray:
    """A table that replaces "a" by "b": root at 0, its child at 1 ^ 0x61, the value beside it."""
    units = np.zeros(256, np.int64)
    units[0], units[0x60], units[0x70] = 1 << 10, 0x10 << 10 | 1 << 8 | 0x61, 1 << 31
    for place_, value in changes.items():
        units[int(place_[1:])] = value
    return units


def _regex(pattern: str) -> dict[str, object]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def _replace(times: int) -> dict[str, object]:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


TOKENIZERS = {
    "nested repeats": (_regex(r"(a+)+b"), r"can run for ever: it repeats a group whose length varies"),
    "repeated alternatives": (_regex(r"(a|aa)+b"), r"can run for ever"),
    "a chain of repeats": (_regex(r"a*a*a*a*a*b"), r"unbounded repeats follow each other"),
    "a reference back": (_regex(r"(a)\1+"), r"refers back"),
    "a Replace pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(\\s+)+x"}, "content": " "}}, r"can run for ever"),
    "no pattern at all": (_regex(r"a)"), r"brackets do not match|no usable tokenizer"),
    "Replace rules that multiply": (_replace(3), r"1e\+06 times as long"),
    "charsmap is not base64": (_normaliser("§§"), r"precompiled_charsmap is damaged"),
    "charsmap of one byte": (_normaliser("AA=="), r"precompiled_charsmap is damaged"),
    "charsmap longer than it is": (
        _normaliser(base64.b64encode((2**31).to_bytes(4, "little") + b"ab").decode()), r"charsmap is damaged"),
    "charsmap leads outside": (
        _normaliser(_charsmap(_units(u0=(1 << 20) << 10), b"b\0")), r"a trie that leads outside itself"),
    "charsmap replaces by nothing there": (
        _normaliser(_charsmap(_units(u112=1 << 31 | 99), b"b\0")), r"a replacement outside its list"),
    "charsmap replaces by half a character": (
        _normaliser(_charsmap(_units(u112=1 << 31 | 1), "我\0".encode())), r"a replacement outside its list"),
    "no model": ({"model": None}, r"no usable tokenizer"),
    "a model of another shape": ({"model": {"type": "BPE", "vocab": 3, "merges": {}}}, r"no usable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("attack", TOKENIZERS)
def test_a_tokenizer(attack, place, capsys):  # noqa: F811
    changes, says = TOKENIZERS[attack]
    edit(place / "model" / "tokenizer.json", **changes)
    refused(probe(place, capsys), says)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a":' + DEEP + "}", "[]", "{"], ids=["NaN", "deep", "list", "cut"])
def test_tokenizer_files_that_are_no_json(name, text, place, capsys):  # noqa: F811
    (place / "model" / name).write_text(text)
    refused(probe(place, capsys), name.replace(".", r"\."))


@pytest.mark.parametrize("how", ["fifo", "link"])
def test_tokenizer_files_that_are_elsewhere(how, place, capsys):  # noqa: F811
    file = place / "model" / "tokenizer.json"
    if how == "fifo":
        _fifo(file)
    else:
        _link(file, place / "t.json")
    refused(probe(place, capsys), r"tokenizer\.json: is (not a plain file|a link)")


@pytest.mark.parametrize(
    "named", [("vocab", "merges"), ("gguf_file",), ("vocab_file", "merges_file"), ("tokenizer_file",)]
)
def test_a_vocabulary_that_is_elsewhere(named, tmp_path):
    """transformers takes these of tokenizer_config.json; a pipe in their place was waited for."""
    words = {"vocab": "v.json", "merges": "m.txt"}
    for folder, more in ((tmp_path, {"elsewhere": 3}), (tmp_path / "model", {})):
        folder.mkdir(exist_ok=True)
        vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2, **more}
        (folder / ("vocab.json" if not more else "v.json")).write_text(json.dumps(vocabulary))
        (folder / ("merges.txt" if not more else "m.txt")).write_text("#version: 0.2\n")
    files = {key: str(tmp_path / words.get(key.removesuffix("_file"), "v.json")) for key in named}
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **files}))
    found = load_tokenizer(tmp_path / "model").get_vocab()
    assert "a" in found and "elsewhere" not in found


@pytest.mark.parametrize("beside", [[], ["merges.txt"], ["added_tokens.json"]], ids=repr)
def test_a_tokenizer_without_a_word(beside, tmp_path):
    """transformers made one for which every post is empty."""
    for name in beside:
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ProbeInputError, match=r"no usable tokenizer \(no tokenizer\.json\)"):
        load_tokenizer(tmp_path)


CUTS = {
    "truncation": {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    "stride beyond the length": {
        "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 9, "direction": "Right"}},
    "padding to 3 billion": {
        "padding": {"strategy": {"Fixed": 3 * 10**9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "x"}},
    "padding to 300": {
        "padding": {"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "x"}},
    "truncation of no shape": {"truncation": 7},
}  # fmt: skip


@pytest.mark.parametrize("attack", CUTS)
def test_what_cuts_or_fills_texts_is_off_and_said(attack, place):  # noqa: F811
    text = "昨晚又没睡好，外面下着雨。"
    whole = load_tokenizer(place / "model")(text)["input_ids"]
    edit(place / "model" / "tokenizer.json", **CUTS[attack])
    with pytest.warns(ProbeWarning, match="off here, every text is read whole"):
        tokenizer = load_tokenizer(place / "model")
    assert tokenizer.backend_tokenizer.encode(text).ids == whole == tokenizer(text)["input_ids"]  # a call resets it


def test_what_was_switched_off_is_said_by_the_command(place, capsys):  # noqa: F811
    edit(place / "model" / "tokenizer.json", **CUTS["truncation"])
    outcome = probe(place, capsys)
    assert outcome.code == 0 and "warning: " in outcome.err and "truncation to 2 tokens" in outcome.err


def test_dropout_of_merges_is_off(place):  # noqa: F811
    value = json.loads((place / "model" / "tokenizer.json").read_text("utf-8"))
    edit(place / "model" / "tokenizer.json", model=value["model"] | {"dropout": 0.9})
    with pytest.warns(ProbeWarning, match="dropout of merges"):
        tokenizer = load_tokenizer(place / "model")
    assert len({tuple(tokenizer("感觉活着没有意义")["input_ids"]) for _ in range(20)}) == 1


def test_a_sound_charsmap_is_taken(place):  # noqa: F811
    edit(place / "model" / "tokenizer.json", **_normaliser(_charsmap(_units(), b"b\0")))
    tokenizer = load_tokenizer(place / "model")
    assert tokenizer("a")["input_ids"] == tokenizer("b")["input_ids"]


def test_a_normalising_tokenizer_is_named(place, capsys):  # noqa: F811
    edit(place / "model" / "tokenizer.json", normalizer={"type": "Lowercase"})
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text("utf-8").splitlines()]
    (place / "rows.jsonl").write_text(json.dumps(rows[0] | {"post": "A Post That Is Not There"}))
    refused(probe(place, capsys), r"the tokenizer normalises what it reads \(Lowercase\)")
