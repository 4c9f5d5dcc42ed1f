import pytest
from hypothesis import given
from hypothesis import strategies as st

from mentalglm_jax.data import chinese
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

EVERY = [(task, language) for task in tasks.TASKS.values() for language in task.languages]
# Words that trip a careless parser: markers, label names, quotation marks, line breaks.
EXPLANATIONS = st.lists(
    st.sampled_from(
        ["Reasoning:", "Answer:", "推理：", "回答：", "No,", "high", '"', "because", "高自杀风险", ".", "\n"]
    ),
    min_size=1,
    max_size=8,
).map(" ".join)


@st.composite
def answers(draw):
    task, language = draw(st.sampled_from(EVERY))
    keys = [label.key for label in task.labels]
    most = 1 if task.arity == "single" else len(keys)
    labels = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=most, unique=True))
    explanation = draw(st.one_of(st.none(), EXPLANATIONS.filter(str.strip)))
    return task, language, labels, explanation, draw(st.sampled_from(["label_first", "explanation_first"]))


@given(answers())
def test_parse_inverts_answer(case):
    task, language, labels, explanation, order = case
    text = tasks.answer(task, labels, explanation, language, order)
    parsed = tasks.parse(task, language, text)
    assert parsed.labels == task.ordered(labels)
    assert parsed.explanation == (explanation.strip() if explanation else None)
    assert parsed.status == ("ok" if explanation else "no_explanation")
    assert parsed.label_span is not None
    assert text[slice(*parsed.label_span)] == task.sentence(labels, language)
    if explanation:
        assert parsed.explanation_span is not None
        assert text[slice(*parsed.explanation_span)] == parsed.explanation


@given(answers())
def test_before_label_is_the_answer_up_to_its_colon(case):
    task, language, labels, explanation, order = case
    text = tasks.answer(task, labels, explanation, language, order)
    assert tasks.explains_first(task, language, text) == (order == "explanation_first" and explanation is not None)
    if explanation is not None:
        head, colon = tasks.before_label(task, explanation, language)
        said = tasks.answer(task, labels, explanation, language, "explanation_first")
        assert head + colon + task.sentence(labels, language) == said and colon.strip() in (":", "：")


def test_label_sets_have_the_published_sizes():
    assert [len(tasks.TASKS[name].keys) for name in ("suicide_risk", "cognitive_distortion", "cognitive_pathway")] == [
        2,
        12,
        19,
    ]
    assert len(tasks.TASKS["imhi_sad"].keys) == 9
    assert len(tasks.TASKS["imhi_multiwd"].all_questions("en")) == 6


@pytest.mark.parametrize(("task", "language"), EVERY, ids=lambda value: getattr(value, "name", value))
def test_no_two_labels_share_a_sentence(task, language):
    assert len(set(task.candidates(language).values())) == len(task.keys)


@pytest.mark.parametrize(
    ("task", "language", "text", "status", "labels"),
    [
        ("imhi_dr", "en", "Yes, the poster suffers from depression. Reasoning: no sleep", "ok", ("yes",)),
        ("imhi_dr", "en", "No, the poster does not suffer from depression.", "no_explanation", ("no",)),
        ("imhi_dr", "en", "No. Reasoning: yes, the poster suffers from depression.", "unknown_label", None),
        ("imhi_dr", "en", "I know. Yes, the poster suffers from depression. Reasoning: x", "unknown_label", None),
        ("imhi_dr", "en", "Yes, the poster suffers from stress. Reasoning: x", "unknown_label", None),
        ("imhi_dr", "en", "", "no_label", None),
        ("imhi_dr", "en", "Reasoning: nothing else", "no_label", None),
        ("suicide_risk", "en", "This post shows  high\nsuicide risk. Reasoning: x", "ok", ("high",)),
        ("suicide_risk", "en", "这个帖子体现了高自杀风险。 推理：x", "unknown_label", None),
        ("suicide_risk", "zh", "这个帖子体现了低自杀风险。推理:他还在求助", "ok", ("low",)),
        ("suicide_risk", "zh", "这个帖子体现了低自杀风险。 推理：", "no_explanation", ("low",)),
        (
            "cognitive_distortion",
            "en",
            "This post shows these cognitive distortions: labeling, mind reading. Reasoning: x",
            "ok",
            ("mind_reading", "labeling"),
        ),
        (
            "cognitive_distortion",
            "en",
            "This post shows these cognitive distortions: labeling, mind reading, labeling. Reasoning: x",
            "ok",
            ("mind_reading", "labeling"),
        ),
        (
            "cognitive_distortion",
            "en",
            "This post shows these cognitive distortions: mind. Reasoning: x",
            "unknown_label",
            None,
        ),
        (
            "cognitive_distortion",
            "en",
            "This post shows these cognitive distortions: . Reasoning: x",
            "unknown_label",
            None,
        ),
        ("cognitive_pathway", "zh", "这个帖子体现的认知路径有：情感、罪责归己/他。 推理：x", "ok", ("A5", "B10")),
    ],
)
def test_parse_is_strict_about_the_whole_sentence(task, language, text, status, labels):
    parsed = tasks.parse(task, language, text)
    assert (parsed.status, parsed.labels) == (status, labels)


def test_prompt_is_imhis_and_leaves_the_post_alone():
    post = 'She said "why {post}?" Question: {question}'
    text = tasks.prompt(post, "Does the poster suffer from stress?", "en")
    assert text == f'Consider this post: "{post}" Question: Does the poster suffer from stress?'
    assert tasks.prompt("你好", "怎么样？", "zh") == '考虑以下这个帖子："你好" 问题：怎么样？'


def test_pathway_spelling_goes_both_ways():
    assert chinese.pathway_name("B3", "en") == "Belief##Mental_filter"
    assert chinese.pathway_name("C2", "zh") == "情绪反应##行为效应"
    for language in ("en", "zh"):
        for key in tasks.TASKS["cognitive_pathway"].keys:
            assert chinese.pathway_key(chinese.pathway_name(key, language), language) == key
    with pytest.raises(InputError, match="Consequence##Behavioral_effect"):
        chinese.pathway_key("Belief##Behavioral_effect", "en")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.get_task("suicide_rsk"), "did you mean 'suicide_risk'"),
        (lambda: tasks.answer("suicide_risk", ["hihg"], "x", "en"), "did you mean 'high'"),
        (lambda: tasks.answer("suicide_risk", ["high", "low"], "x", "en"), "takes one label"),
        (lambda: tasks.answer("cognitive_distortion", [], "x", "en"), "no label"),
        (lambda: tasks.answer("cognitive_distortion", ["labeling"] * 2, "x", "en"), "twice"),
        (lambda: tasks.answer("suicide_risk", ["high"], " ", "en"), "explanation is empty"),
        (lambda: tasks.TASKS["imhi_dr"].question("zh"), "no language 'zh'"),
        (lambda: tasks.prompt("post", "question", "fr"), "unknown language 'fr'"),
        (lambda: chinese.pathway_name("B11", "en"), "unknown label 'B11'"),
    ],
)
def test_wrong_requests_name_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
