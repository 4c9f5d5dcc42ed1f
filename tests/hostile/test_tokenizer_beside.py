"""Files beside tokenizer.json: transformers takes tokens, rules and templates from them. Equal ids there and here, or a
refusal."""

import json
import shutil
import warnings

import pytest
import transformers

from mentalglm_jax.errors import InputError
from mentalglm_jax.text.beside import TokenizerClassWarning
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.text.tokenizer_files import SPLIT
from probes.errors import ProbeInputError
from probes.intake.template import chat_template
from probes.models.tokenizer import load_tokenizer
from tests.mentalglm_jax.chat_families import LLAMA2, PLAIN, SMOLLM, write_family

POST = "I have not slept 12345 days,  It's THE end.\n\nOur cafe\u0301 <x>"
ASKED = [{"role": "user", "content": POST}]
TYPES = {"glm": "glm", "qwen": "qwen2", "smollm": "llama", "llama2": "llama", "nemo": "mistral"}


def written(directory, family="qwen"):
    if family == "glm":
        shutil.copytree(BUILTIN, directory)
    else:
        write_family(directory, family)
    (directory / "config.json").write_text(json.dumps({"model_type": TYPES[family], "vocab_size": 4000}))
    return directory


def edit(name, **changes):
    def damage(directory):
        path = directory / name
        value = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(value | changes), "utf-8")

    return damage


def config(**changes):
    return edit("tokenizer_config.json", **changes)


def decoder(content=None, **flags):
    """``added_tokens_decoder`` as tokenizer.json has it, with a token more or other flags."""

    def damage(directory):
        raw = json.loads((directory / "tokenizer.json").read_text("utf-8"))
        tokens = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} | flags for one in raw["added_tokens"]}
        if content:
            tokens["3999"] = {"content": content, "special": False}
        config(added_tokens_decoder=tokens)(directory)

    return damage


def in_tokenizer(change):
    def damage(directory):
        raw = json.loads((directory / "tokenizer.json").read_text("utf-8"))
        change(raw)
        (directory / "tokenizer.json").write_text(json.dumps(raw), "utf-8")

    return damage


def first_step(**changes):
    return in_tokenizer(lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(changes))


def second_template(directory):
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0].content }}")


def theirs_or_nothing(directory):
    try:
        return theirs(directory)
    except Exception:
        return None


def written_ids(family, name, directory):
    config(tokenizer_class=name)(written(directory, family))
    return theirs(directory)


def theirs(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=True, return_dict=False)


NAMED = "names the token 'slept', which is none of the added_tokens"
REFUSED = {
    **{f"{key} slept": (config(**{key: "slept"}), f"tokenizer_config.json: {key} {NAMED}")
       for key in ("bos_token", "pad_token", "unk_token", "mask_token", "my_token")},
    "an object": (config(sep_token={"content": "slept", "__type": "AddedToken"}), f"sep_token {NAMED}"),
    **{key: (config(**{key: ["slept"]}), f"{key} {NAMED}")
       for key in ("extra_special_tokens", "additional_special_tokens")},
    **{f"{key}, by name": (config(**{key: {"my": "slept"}}), f"{key} {NAMED}")
       for key in ("extra_special_tokens", "model_specific_special_tokens")},
    "special_tokens_map.json": (edit("special_tokens_map.json", sep_token="slept"), f"map.json: sep_token {NAMED}"),
    "added_tokens.json": (edit("added_tokens.json", slept=3999), f"added_tokens.json: the list {NAMED}"),
    "added_tokens_decoder": (decoder("slept"), f"added_tokens_decoder {NAMED}"),
    "a token of letters": (config(eos_token="the"), "eos_token names the token 'the', which is none of the added_tok"),
    **{flag: (decoder(**{flag: True}), f"added_tokens_decoder has {flag} for") for flag in ("lstrip", "rstrip")},
    "letters": (config(split_special_tokens=True), "split_special_tokens has transformers write the marks"),
    "letters by the map": (edit("special_tokens_map.json", split_special_tokens=True), "p.json: split_special_tok"),
    "another file": (config(fast_tokenizer_files=["tokenizer.4.0.json"]), "fast_tokenizer_files names 'tokenizer.4.0"),
    "a second template": (second_template, "default.jinja: is a second default template"),
}  # fmt: skip


@pytest.mark.parametrize("family", ["glm", "qwen"])
@pytest.mark.parametrize("attack", REFUSED)
def test_what_would_change_ids(tmp_path, attack, family):
    damage, says = REFUSED[attack]
    damage(written(tmp_path / "t", family))
    with pytest.raises(InputError, match=says):
        GlmTokenizer.load(tmp_path / "t")


RULES = {
    "an ending of words": ("qwen", in_tokenizer(lambda raw: raw["model"].update(end_of_word_suffix="x")),
                           "end_of_word_suffix is not supported"),
    "digits three by three": ("qwen", first_step(pattern={"Regex": SPLIT}), "for model_type qwen2 transformers splits"),
    "letters as they are": ("qwen", in_tokenizer(lambda raw: raw.update(normalizer=None)), "rules of Qwen2Tokenizer"),
    "a space before": ("qwen", config(add_prefix_space=True), "rules of Qwen2Tokenizer"),
    "Qwen2's class": ("smollm", config(tokenizer_class="Qwen2TokenizerFast"), "class 'Qwen2TokenizerFast' tr"),
    "in config.json": ("smollm", lambda d: (edit("config.json", tokenizer_class="CohereTokenizer")(d),
                                            config(tokenizer_class=None)(d)), "rules of CohereTokenizer"),
    "in the map": ("smollm", edit("special_tokens_map.json", add_prefix_space=True), None),
    "GPT-2's class over digits": ("smollm", lambda d: (
        in_tokenizer(lambda raw: raw["model"]["vocab"].update({"12": raw["model"]["vocab"].pop("ing")}) or
                     raw["model"].update(merges=[["1", "2"]]))(d), config(tokenizer_class="GPT2Tokenizer")(d)),
        "rules of GPT2Tokenizer"),
    "GPT-2's class over letters": ("llama2", config(tokenizer_class="GPT2Tokenizer"), "rules of GPT2Tokenizer"),
    "another split": ("nemo", lambda d: (first_step(pattern={"Regex": SPLIT})(d), config(fix_mistral_regex=True)(d)),
                      "fix_mistral_regex has transf"),
}  # fmt: skip


@pytest.mark.parametrize("attack", RULES)
def test_a_class_with_rules_of_its_own(tmp_path, attack):
    family, damage, says = RULES[attack]
    damage(written(tmp_path / "t", family))
    if says is None:
        assert GlmTokenizer.load(tmp_path / "t").ask_ids(ASKED) == theirs(tmp_path / "t")
        return
    with pytest.raises(InputError, match=says):
        GlmTokenizer.load(tmp_path / "t")


def decoders(change):
    """``added_tokens_decoder`` with what tokenizer.json has, changed."""

    def damage(directory):
        added = json.loads((directory / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        listed = {str(token["id"]): {key: token[key] for key in ("content", "special")} for token in added}
        config(added_tokens_decoder=change(listed))(directory)

    return damage


LISTS = {
    "none": decoders(lambda listed: {}),
    "the first left out": decoders(lambda listed: dict([*listed.items()][1:])),
    "in another order": decoders(lambda listed: dict(zip(listed, [*listed.values()][::-1], strict=True))),
    "the older file": edit("added_tokens.json", **{"<|im_end|>": 0}),
}


@pytest.mark.parametrize(("family", "name"), [("qwen", "Qwen2Tokenizer"), ("smollm", "GPT2Tokenizer")])
@pytest.mark.parametrize("attack", LISTS)
def test_what_a_class_that_is_built_anew_would_add(tmp_path, attack, family, name):
    """transformers takes the vocabulary of tokenizer.json there, and the added tokens of these lists."""
    config(tokenizer_class=name)(written(tmp_path / "t", family))
    LISTS[attack](tmp_path / "t")
    with pytest.raises(InputError, match="posts would be other ids there"):
        GlmTokenizer.load(tmp_path / "t")
    assert theirs_or_nothing(tmp_path / "t") != written_ids(family, name, tmp_path / "u")


@pytest.mark.parametrize(("family", "name"), [("qwen", "Qwen2Tokenizer"), ("smollm", "GPT2Tokenizer")])
def test_a_list_that_says_the_same(tmp_path, family, name):
    config(tokenizer_class=name)(written(tmp_path / "t", family))
    decoders(lambda listed: listed)(tmp_path / "t")
    assert GlmTokenizer.load(tmp_path / "t").ask_ids(ASKED) == theirs(tmp_path / "t")


TAKEN = {
    "as written": lambda d: None, "the same again": decoder(), "no special flag": decoder(special=False),
    "no class": config(tokenizer_class=None), "an unknown class": config(tokenizer_class="ChatGLM4Tokenizer"),
    "transformers' own": config(tokenizer_class="TokenizersBackend"),
    "GPT-2's class": config(tokenizer_class="GPT2Tokenizer"),
    "bos and eos": config(add_bos_token=True, add_eos_token=True, clean_up_tokenization_spaces=True, legacy=True),
    "lengths": config(model_max_length=8, truncation_side="left", padding="max_length", max_length=40),
    "what the class would cut": config(tokenizer_truncation={"max_length": 8, "stride": 0, "direction": "right",
                                                             "strategy": "longest_first"}),
    "vocab.json": lambda d: (d / "vocab.json").write_text('{"a": 0}'),
    "the last of two templates": config(chat_template=[{"name": "default", "template": PLAIN},
                                                       {"name": "default", "template": SMOLLM}]),
    "templates by name": config(chat_template={"default": SMOLLM, "rag": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("change", TAKEN)
def test_the_same_ids(tmp_path, change):
    """What is no difference is taken; and of what is one, both read the same."""
    TAKEN[change](written(tmp_path / "t", "smollm"))
    assert GlmTokenizer.load(tmp_path / "t").ask_ids(ASKED) == theirs(tmp_path / "t")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("family", ["qwen", "llama2"])
def test_a_token_that_trims(tmp_path, family, flag):
    written(tmp_path / "t", family)
    in_tokenizer(lambda raw: raw["added_tokens"][1].update({flag: True}))(tmp_path / "t")
    with pytest.raises(InputError, match=r"(takes the spaces beside it away|is read as letters beside a word)"):
        GlmTokenizer.load(tmp_path / "t")


def test_llama_2s_class_is_read_otherwise_by_transformers_5(tmp_path):
    """As published. Its tokenizer.json is what the model was trained with, so that is taken, and said."""
    written(tmp_path / "t", "llama2")
    config(tokenizer_class="LlamaTokenizer", legacy=False, chat_template=LLAMA2)(tmp_path / "t")
    with pytest.warns(TokenizerClassWarning, match="puts a space before texts by its own rule .first."):
        ours = GlmTokenizer.load(tmp_path / "t").ask_ids(ASKED)
    assert ours != theirs(tmp_path / "t")
    config(tokenizer_class="PreTrainedTokenizerFast")(tmp_path / "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GlmTokenizer.load(tmp_path / "t").ask_ids(ASKED) == ours == theirs(tmp_path / "t")


def test_probes_reads_no_other_file_either(tmp_path):
    config(fast_tokenizer_files=["tokenizer.1.json"])(written(tmp_path / "t"))
    with pytest.raises(ProbeInputError, match=r"names 'tokenizer\.1\.json'"):
        load_tokenizer(tmp_path / "t")
    second_template(written(tmp_path / "u"))
    with pytest.raises(ProbeInputError, match="is a second default template"):
        chat_template(tmp_path / "u")


def with_own(special, change):
    """A token of its own, "slept", that tokenizer.json says is special or not."""

    def damage(directory):
        def add(raw):
            number = max(*raw["model"]["vocab"].values(), *(one["id"] for one in raw["added_tokens"])) + 1
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            raw["added_tokens"].append({"id": number, "content": "slept", "special": special, **flags})

        in_tokenizer(add)(directory)
        change(directory)

    return damage


def listed(special):
    return decoders(lambda all: {key: one | ({"special": special} if one["content"] == "slept" else {})
                                 for key, one in all.items()})  # fmt: skip


SPECIAL = {
    "by the list": ("glm", with_own(False, listed(True)), "added_tokens_decoder makes 'slept' a special token"),
    "by the list, Qwen": ("qwen", with_own(False, listed(True)), "added_tokens_decoder makes 'slept' a special token"),
    "by a role": ("glm", with_own(False, config(unk_token="slept")), "config.json: unk_token makes 'slept' a special"),
    "by a name": ("smollm", with_own(False, config(my_token="slept")), "my_token makes 'slept' a special token"),
    "by the map": ("smollm", with_own(False, edit("special_tokens_map.json", sep_token="slept")), "p.json: sep_token"),
    "more by name": ("smollm", with_own(False, config(extra_special_tokens={"my": "slept"})), "extra_special_tokens m"),
    "no longer": ("qwen", with_own(True, listed(False)), "says 'slept' is no special token, so Qwen2Tokenizer"),
    "in both": ("qwen", with_own(True, listed(True)), None), "in none": ("qwen", with_own(False, listed(False)), None),
    "a role of ours": ("smollm", with_own(False, config(pad_token="slept")), None),
    "added_tokens.json": ("smollm", with_own(False, edit("added_tokens.json", slept=3999)), None),
    "taken as it is": ("smollm", with_own(True, listed(False)), None),
}  # fmt: skip


@pytest.mark.parametrize("attack", SPECIAL)
def test_which_tokens_an_answer_is_written_without(tmp_path, attack):
    family, damage, says = SPECIAL[attack]
    damage(written(tmp_path / "t", family))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    there = tokenizer.decode([tokenizer.convert_tokens_to_ids("slept")], skip_special_tokens=True)
    if says is None:
        ours = GlmTokenizer.load(tmp_path / "t")
        assert ours.decode([ours.id_of("slept")]) == there
        return
    with pytest.raises(InputError, match=says):
        GlmTokenizer.load(tmp_path / "t")
    assert there == ("slept" if attack == "no longer" else "")
