"""Why an answer ended: marked, counted, never "ok" when it was cut; and a default limit that cuts no allowed answer."""

import itertools

import pytest
from flax import nnx

from mentalglm_jax.data.explain.checks import Limits
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.evaluate.scores import evaluate
from mentalglm_jax.evaluate.tables import format_table
from mentalglm_jax.inference.decode import LEAST_NEW_TOKENS, MAX_NEW_TOKENS, default_room
from mentalglm_jax.inference.generate import count_unread, generation_row
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

TASK = tasks.TASKS["suicide_risk"]


@pytest.fixture(scope="module")
def tokenizer():
    return GlmTokenizer.load(BUILTIN)


def record(name="a", language="en"):
    return Record(name, TASK.name, language, "so tired", TASK.question(language), label="low")


def row(tokenizer, text, *, stop, name="a"):
    ids = tokenizer.encode("\n" + text)
    return generation_row(record(name), tokenizer, [7], [*ids, tokenizer.stop_id] if stop else ids)


WHOLE = "This post shows low suicide risk. Reasoning: they ask for help"
ANSWERS = [
    (WHOLE, True, "stop", "ok"),
    (WHOLE, False, "length", "cut_off"),
    ("This post shows low suicide risk.", False, "length", "no_explanation"),
    ("Reasoning: they ask for", False, "length", "no_label"),
    ("Reasoning: they ask for help Answer: This post shows low", False, "length", "unknown_label"),
    ("Reasoning: they ask for help Answer: This post shows low suicide risk.", False, "length", "cut_off"),
    ("This post shows low", False, "length", "unknown_label"),
    ("This post shows low", True, "stop", "no_explanation"),
]


@pytest.mark.parametrize(("text", "stop", "finish", "status"), ANSWERS)
def test_a_row_says_why_its_answer_ended(tokenizer, text, stop, finish, status):
    made = row(tokenizer, text, stop=stop)
    assert (made["finish"], made["parse_status"], made["output_text"]) == (finish, status, text)


def test_cut_answers_are_counted(tokenizer):
    rows = [row(tokenizer, text, stop=stop, name=str(n)) for n, (text, stop, _, _) in enumerate(ANSWERS)]
    assert count_unread(rows)["cut_off"] == 6
    entry = evaluate(rows)["suicide_risk"]
    assert entry["cut_off"] == 6 and (entry["parse_status"]["ok"], entry["parse_status"]["cut_off"]) == (1, 2)
    assert "answers cut off by the token limit: suicide_risk 6" in str(format_table({"suicide_risk": entry}).caption)
    old = [{key: value for key, value in one.items() if key != "finish"} for one in rows]  # of a version without it
    assert evaluate(old)["suicide_risk"]["cut_off"] == count_unread(old)["cut_off"] == 0


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(SyntheticConfig())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_default_limit_holds_the_longest_explanation_allowed(tokenizer, corpus, language):
    """In the words of the corpus that the tokenizer was made for, after the longest label sentence of any task."""
    said = [r.explanation or "" for r in corpus if r.language == language]
    if language == "zh":
        text = "".join(said)[: Limits.zh_characters[1]]
    else:
        text = " ".join(itertools.islice((word for one in said for word in one.split()), Limits.en_words[1]))
    spoken = [task for task in tasks.TASKS.values() if language in task.languages]
    answers = [tasks.answer(task, task.keys if task.arity == "multi" and len(task.keys) < 13 else task.keys[:1], text,
                            language) for task in spoken]  # fmt: skip
    longest = max(len(tokenizer.encode("\n" + answer)) + 1 for answer in answers)
    assert longest <= MAX_NEW_TOKENS
    per = {"zh": 1.5 * Limits.zh_characters[1], "en": 2 * Limits.en_words[1]}[language]
    assert per + 40 <= MAX_NEW_TOKENS  # what its comment says, should the limits change


@pytest.mark.parametrize(
    ("context", "prompt", "room"),
    [(8192, 300, MAX_NEW_TOKENS), (1024, 500, 524), (1024, 900, LEAST_NEW_TOKENS), (128, 30, LEAST_NEW_TOKENS)],
    ids=["plenty", "what-is-left", "refused-as-before", "tiny"],
)
def test_without_a_limit_the_context_sets_it(context, prompt, room):
    config = GlmConfig(vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=8, max_position_embeddings=context)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    assert default_room(model, [[1] * prompt, [1]]) == room
