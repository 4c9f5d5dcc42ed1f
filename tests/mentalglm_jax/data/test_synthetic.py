import re
from collections import Counter

import pytest
from pydantic import ValidationError

from mentalglm_jax.data import synthetic
from mentalglm_jax.data.synthetic import (
    QUOTES,
    SYNTHETIC_TASKS,
    SyntheticConfig,
    cue_templates,
    load_phrases,
    make_corpus,
    pretraining_chats,
)
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

SMALL = {"n_train": 76, "n_dev": 19, "n_test": 38}
RISK = {"tasks": ("suicide_risk",)}


def corpus(**options):
    return make_corpus(SyntheticConfig(**{**SMALL, **options}))


@pytest.fixture(scope="module")
def records():
    return corpus()


def phrases(record, name):
    return [record.post[start:end] for start, end in getattr(record, name)]


def quotes(record):
    opening, closing = QUOTES[record.language]
    return re.findall(f"{opening}([^{opening}{closing}]+){closing}", record.explanation)


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(records):
    assert corpus() == records
    other = corpus(seed=1)
    assert not {record.post for record in other} & {record.post for record in records}


def test_sizes_and_balance(records):
    assert Counter(record.split for record in records) == {"train": 76 * 6, "dev": 19 * 6, "test": 38 * 6}
    for language in ("en", "zh"):
        risk = Counter(r.label for r in records if r.task == "suicide_risk" and r.language == language)
        assert abs(risk["high"] - risk["low"]) <= 3  # one of an odd part per split
        for task in ("cognitive_distortion", "cognitive_pathway"):
            chosen = [r for r in records if r.task == task and r.language == language]
            seen = Counter(key for record in chosen for key in record.gold)
            assert set(seen) == set(tasks.TASKS[task].keys)
            share = sum(len(record.gold) == 2 for record in chosen) / len(chosen)
            assert 0.15 < share < 0.45
            assert max(len(record.gold) for record in chosen) == 2


def test_growing_one_split_leaves_the_others_alone(records):
    grown = {record.id: record for record in corpus(n_train=80)}
    assert all(grown[record.id] == record for record in records if record.split != "train")


def test_no_post_stands_twice(records):
    assert len({record.post for record in records}) == len(records)
    assert len({record.id for record in records}) == len(records)


def test_posts_stay_unique_until_there_are_no_new_ones(monkeypatch):
    # One cue per label, one decoy, one distractor: 6 orders and 4 ways of punctuation, so 24 posts per label.
    cues = {key: {"a": [f"{key} cue"], "b": [f"{key} cue"]} for key in ("high", "low")}
    bank = {"slots": {}, "decoys": ["decoy"], "distractors": {"x": {"name": "x", "phrases": ["filler"]}}}
    monkeypatch.setattr(synthetic, "load_phrases", lambda language: {**bank, "suicide_risk": cues})
    config = SyntheticConfig(**RISK, languages=("en",), n_clauses=(3, 3), n_train=20, n_dev=5, n_test=5)
    assert len({record.post for record in make_corpus(config)}) == 30
    with pytest.raises(InputError, match="no new suicide_risk post in en left"):
        make_corpus(config.model_copy(update={"n_train": 50}))


def test_the_explanation_quotes_each_cue_and_nothing_else(records):
    for record in records:
        assert len(record.cues) == len(record.gold)
        assert len(record.decoys) == 1
        assert sorted(quotes(record)) == sorted(phrases(record, "cues"))
        for quote in quotes(record):
            assert record.post.count(quote) == 1


def test_cues_belong_to_the_label_and_the_rest_is_neutral(records):
    """Every clause is accounted for: cues match a template of their label, no other clause matches any."""

    def pattern(template):
        return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))

    for record in records[::7]:
        by_key = {
            key: [pattern(t) for t in cue_templates(record.task, key, record.language)]
            for key in tasks.TASKS[record.task].keys
        }
        names = {label.key: label.name(record.language) for label in tasks.TASKS[record.task].labels}
        said = re.split(r"(?<=[.。])\s*(?=The post|帖子里)", record.explanation)
        assert len(said) == len(record.gold)
        for key, sentence in zip(record.gold, said, strict=True):
            assert names[key] in sentence
            (quote,) = [quote for quote in quotes(record) if quote in sentence]
            assert any(p.fullmatch(quote) for p in by_key[key])
        rest = record.post
        for phrase in phrases(record, "cues"):
            rest = rest.replace(phrase, "")
        for clause in re.split(r"[.,。，]\s*", rest):
            assert not any(p.fullmatch(clause) for patterns in by_key.values() for p in patterns)


def test_the_number_of_clauses_is_as_asked():
    for record in corpus(n_clauses=(4, 7)):
        assert 4 <= len([c for c in re.split(r"[.,。，]\s*", record.post) if c]) <= 7


def test_redundancy_plants_every_cue_twice():
    for record in corpus(redundancy=True):
        said = Counter(phrases(record, "cues"))
        assert set(said.values()) == {2}
        assert sorted(quotes(record)) == sorted(said)


@pytest.mark.parametrize("logic", ["and", "or"])
def test_logic_needs_both_or_one_of_two_cues(logic):
    high = [re.sub(r"\{\w+\}", ".+", t) for f in "ab" for t in cue_templates("suicide_risk", "high", "en", f)]
    seen = Counter()
    for record in corpus(**RISK, languages=("en",), logic=logic):
        forms = [any(re.fullmatch(p, cue) for p in high) for cue in phrases(record, "cues")]
        assert len(forms) == 2
        assert record.label == ("high" if (all(forms) if logic == "and" else any(forms)) else "low")
        assert sorted(quotes(record)) == sorted(phrases(record, "cues"))
        seen[record.label, sum(forms)] += 1
    assert seen[("low", 1) if logic == "and" else ("high", 1)] > 20
    labels = Counter()
    for (label, _), count in seen.items():
        labels[label] += count
    assert abs(labels["high"] - labels["low"]) <= 2


def decoy_share(correlation):
    """How often the decoy alone gives the label away, by the best guess per decoy template."""
    patterns = [re.sub(r"\{\w+\}", ".+", t) for t in load_phrases("en")["decoys"]]
    seen = Counter()
    for record in corpus(**RISK, languages=("en",), n_train=400, decoy_correlation=correlation):
        (decoy,) = phrases(record, "decoys")
        seen[next(i for i, p in enumerate(patterns) if re.fullmatch(p, decoy)), record.label] += 1
    best = sum(max(seen[i, "high"], seen[i, "low"]) for i in range(len(patterns)))
    return best / sum(seen.values())


def test_the_decoy_tells_the_label_only_as_much_as_asked():
    assert decoy_share(0.0) < 0.65
    assert decoy_share(1.0) == 1.0
    assert 0.7 < decoy_share(0.6) < 0.95


def test_unfaithful_twins_differ_only_in_what_they_cite(records):
    twins = corpus(variant="unfaithful")
    for record, twin in zip(records, twins, strict=True):
        same = ("id", "post", "label", "labels", "question", "split", "cues", "decoys")
        assert all(getattr(record, name) == getattr(twin, name) for name in same)
        assert set(quotes(twin)) == set(phrases(twin, "decoys"))
        assert twin.source != record.source


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_banks_are_large_and_well_formed(language):
    bank = load_phrases(language)
    distractors = [p for topic in bank["distractors"].values() for p in topic["phrases"]]
    assert len(distractors) >= 30
    assert len(bank["decoys"]) >= 8
    everything = distractors + bank["decoys"]
    for task in SYNTHETIC_TASKS:
        for key in tasks.TASKS[task].keys:
            own = cue_templates(task, key, language)
            assert len(own) >= (6 if task == "suicide_risk" else 3)
            everything += own
    for template in everything:
        assert not re.search(r'[,.;"“”，。；、]', template), template
        assert set(re.findall(r"\{(\w+)\}", template)) <= set(bank["slots"]), template
        assert template == template.strip()


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_no_cue_template_belongs_to_two_labels(task):
    for language in ("en", "zh"):
        every = [t for key in tasks.TASKS[task].keys for t in cue_templates(task, key, language)]
        assert len(set(every)) == len(every)


def test_reading_exercises_quote_the_post_and_show_no_label():
    config = SyntheticConfig()
    chats = list(pretraining_chats(config, 400))
    assert chats == list(pretraining_chats(config, 400))
    assert chats != list(pretraining_chats(config, 400, seed=9))
    assert {language for _, _, language in chats} == {"en", "zh"}
    forbidden = [
        text
        for name in SYNTHETIC_TASKS
        for language in ("en", "zh")
        for text in (
            tasks.TASKS[name].question(language),
            tasks.TASKS[name].templates[language].split("{}")[0],
        )
    ]
    labels = [
        label.name(lang) for name in SYNTHETIC_TASKS for lang in ("en", "zh") for label in tasks.TASKS[name].labels
    ]
    kinds = Counter()
    for user, assistant, language in chats:
        post = user.split('"')[1]
        opening, closing = QUOTES[language]
        question = user.rsplit("Question: " if language == "en" else "问题：", 1)[1]
        said = re.findall(f"{opening}([^{opening}{closing}]+){closing}", assistant)
        assert not any(text in user + assistant for text in forbidden)
        if question.startswith(("Write these words", "把这些词")):  # the only place where label names stand
            listed = re.split("[：:] ?", question, maxsplit=1)[1].rstrip("。").removesuffix(".")
            assert assistant == listed
            assert all(word in labels for word in re.split(", |、", listed))
        elif assistant.startswith(("The post mentions", "帖子提到了")):
            names = re.split(", |、", assistant.removeprefix("The post mentions ").removeprefix("帖子提到了")[:-1])
            topics = load_phrases(language)["distractors"].values()
            assert set(names) <= {topic["name"] for topic in topics}
        elif question in ("Write the post again.", "把帖子再写一遍。"):
            assert assistant == post
        else:
            assert said
            assert all(clause in post for clause in said)
        kinds[re.sub('["“].*?["”]', "", re.split("[：:]", question)[0])] += 1
    assert len(kinds) > 16  # seven kinds and the topics, in two languages


def test_fillings_bound_the_wordings_of_a_phrase():
    def cues(fillings):
        records = make_corpus(SyntheticConfig(n_train=200, n_dev=0, n_test=0, languages=("en",),
                                              tasks=("suicide_risk",), fillings=fillings))  # fmt: skip
        return {record.post[a:b] for record in records for a, b in record.cues}

    templates = sum(len(cue_templates("suicide_risk", key, "en")) for key in ("high", "low"))
    assert len(cues(1)) <= templates < len(cues(2)) <= 2 * templates < len(cues(None))


def test_templates_bound_the_cue_phrases_of_a_label():
    config = SyntheticConfig(n_train=900, n_dev=0, n_test=0, languages=("en",), fillings=1, templates=2)
    cues: dict[tuple[str, str], set[str]] = {}
    for record in make_corpus(config):
        if len(record.labels or (record.label,)) == 1:
            cues.setdefault((record.task, record.label or record.labels[0]), set()).update(
                record.post[a:b] for a, b in record.cues
            )
    # Suicide risk has two facets; B5 and B10 of the pathway take the phrases of two distortions, B6 adds its own.
    double = [("suicide_risk", key) for key in ("high", "low")] + [("cognitive_pathway", f"B{n}") for n in (5, 6, 10)]
    assert {key: len(found) for key, found in cues.items()} == {key: 4 if key in double else 2 for key in cues}
    assert len(cues) == 2 + 12 + 19


def test_uncued_training_posts_carry_no_cue_and_a_label_by_lot():
    records = make_corpus(SyntheticConfig(n_train=400, n_dev=0, n_test=50, uncued=0.25))
    risk = [r for r in records if r.task == "suicide_risk" and r.split == "train"]
    uncued = [r for r in risk if not r.cues]
    assert 0.2 < len(uncued) / len(risk) < 0.3
    assert 0.4 < sum(r.label == "high" for r in uncued) / len(uncued) < 0.6
    assert not any(mark in r.explanation for r in uncued for mark in '"“')
    assert all(r.cues for r in records if r.task != "suicide_risk" or r.split == "test")


def test_labels_and_explanation_follow_the_order_of_the_post():
    records = make_corpus(SyntheticConfig(n_train=60, n_dev=0, n_test=0, tasks=("cognitive_distortion",)))
    two = [record for record in records if len(record.labels) == 2]
    assert two
    for record in two:
        quoted = [record.explanation.find(record.post[a:b]) for a, b in record.cues]
        assert quoted == sorted(quoted)
        assert record.cues[0] < record.cues[1]
    keys = tasks.TASKS["cognitive_distortion"].keys
    assert any(keys.index(r.labels[0]) > keys.index(r.labels[1]) for r in two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logic": "and"}, "'and' is defined for suicide_risk only; remove cognitive_distortion"),
        ({"logic": "or", "tasks": ("suicide_risk",), "uncued": 0.1}, "uncued: cannot be combined"),
        ({"n_clauses": (7, 4)}, r"n_clauses: \(7, 4\)"),
        ({"n_clauses": (1, 4)}, "n_clauses"),
        ({"tasks": ()}, "tasks: give at least one"),
        ({"languages": ("en", "en")}, "languages: .*each once"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SyntheticConfig(**options)


@pytest.mark.parametrize("options", [{"sed": 1}, {"decoy_correlation": 1.5}, {"n_train": -1}, {"variant": "fair"}])
def test_unknown_keys_and_values_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        SyntheticConfig(**options)
