"""Our own prompt puts a post in quotation marks: what may fuse with them, and that no map ever takes it away."""

import unicodedata
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from probes.checks.faithfulness import cited_effects
from probes.checks.gates import judge
from probes.errors import RowRefused
from probes.models.encode import encode
from probes.models.token_bytes import TokenBytes
from probes.probe import Probe
from probes.saliency.attribute import Settings, attribute
from probes.suite import BUDGETS
from tests.probes.tiny import make_model

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé帖9 \n.。!\"'”…😭-")), min_size=1
)


def letters(text: str) -> str:
    """The letters and digits of a text."""
    return "".join(char for char in text if unicodedata.category(char)[0] in "LN")


@pytest.fixture(scope="module")
def glm() -> GlmTokenizer:
    return GlmTokenizer.load(BUILTIN)


@pytest.fixture(scope="module")
def reader() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BUILTIN)


def row(glm: GlmTokenizer, post: str, language: str, name: str = "suicide_risk") -> dict[str, Any]:
    task = tasks.get_task(name)
    candidates = task.candidates(language)
    said = candidates[task.keys[0]]
    question = task.question(language)
    return {
        "id": "1", "task": name, "post": post, "question": question,
        "prompt_ids": glm.prompt_ids(tasks.prompt(post, question, language)),
        "output_ids": [*glm.encode("\n" + said), glm.eos_ids[1]], "parsed_label": task.keys[0], "label_text": said,
        "candidates": candidates,
    }  # fmt: skip


@pytest.mark.parametrize("language", ["en", "zh"])
@given(post=TEXTS.filter(str.strip))
@example(post="word.").via("the closing mark fuses with punctuation")
@example(post="'s all").via("a contraction after the opening mark")
def test_no_vocabulary_can_fuse_a_letter_with_our_quotation_marks(
    reader: PreTrainedTokenizerFast, language: str, post: str
) -> None:
    """Merges happen within the pieces of GLM's split only; in our prompt no piece holds a letter or digit of the post
    and a character of the template."""
    text = "\n" + tasks.prompt(post, tasks.get_task("suicide_risk").question(language), language)
    start = text.index(post, text.index('"') + 1)
    for _, (a, b) in reader.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
        inside = range(max(a, start), min(b, start + len(post)))
        assert len(inside) in (0, b - a) or not letters(text[inside.start : inside.stop]), text[a:b]


@given(post=TEXTS.filter(str.strip), language=st.sampled_from(["en", "zh"]))
def test_border_tokens_of_our_prompt_hold_no_letter(
    glm: GlmTokenizer, reader: PreTrainedTokenizerFast, post: str, language: str
) -> None:
    try:
        found = encode(row(glm, post, language), TokenBytes(reader))
    except RowRefused:  # nothing but what is fused
        assert not letters(post)
        return
    fixed = "".join(char for char, varied in zip(post, found.varied, strict=True) if not varied)
    assert not letters(fixed)


@pytest.mark.parametrize(
    ("post", "language"), [("I ate... It rained. I cannot go on.", "en"), ("吃了饭，下了雨。活着没有意义。", "zh")]
)
def test_what_is_fused_stays_in_every_pass(
    glm: GlmTokenizer, reader: PreTrainedTokenizerFast, post: str, language: str
) -> None:
    """Every pass over a perturbed post, of every method, gate and effect, sees the border token's own embedding and
    attends to it."""
    probe = Probe(make_model(reader), reader)
    laid_out = probe.encode(row(glm, post, language))
    at, first = list(laid_out.border), laid_out.post_tok[0]
    assert reader.decode([laid_out.ids[i] for i in at]) == post[-1] + '"'
    own, seen = probe.model.get_input_embeddings().weight[[laid_out.ids[i] for i in at]], []

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None:  # what stands before the post, run once
            assert kwargs["inputs_embeds"].shape[1] == first
        else:
            seen.append((kwargs["inputs_embeds"].detach(), kwargs["attention_mask"]))

    probe.scorer.check(laid_out)
    handle = probe.model.register_forward_pre_hook(watch, with_kwargs=True)
    methods = [method for method in BUDGETS["full"][0] if method != "shap"]
    try:
        settings = Settings(max_steps=16)
        maps = attribute(probe, laid_out, methods, ("label",), settings, ("the sun shone, ", "we ate soup. "))
        judge(probe, laid_out, maps, settings)
        cited_effects(probe, laid_out, [(0, 5)])
    finally:
        handle.remove()
    assert seen
    for embeds, mask in seen:
        assert torch.equal(embeds[:, [i - first for i in at]], own.expand(len(embeds), -1, -1))
        if mask is not None and mask.ndim == 4:
            assert bool((mask[:, 0, laid_out.prompt_len - 1 - first, at] == 0).all())
        elif mask is not None:
            assert bool((mask[:, at] == 1).all())
