"""Metrics against definitions written out and against scikit-learn; failures and alignment; intervals; baselines."""

import io
import json
import random
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.sources import load_upstream
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import evaluate, floors, format_table, quotes, read_generations
from mentalglm_jax.evaluate.answers import generated
from mentalglm_jax.evaluate.metrics import indicator
from mentalglm_jax.evaluate.scores import against_floor
from mentalglm_jax.evaluate.statistics import MIN_POSTS
from mentalglm_jax.text import tasks

AVERAGES = ("weighted_f1", "micro_f1", "macro_f1")


def record(number, task, gold, *, post=None, language=None, **more) -> Record:
    """A record; ``gold`` is a key for single-label tasks, a list of keys for the others."""
    kind, language = tasks.TASKS[task].arity, language or tasks.TASKS[task].languages[0]
    more |= {"label": gold} if kind == "single" else {"labels": tuple(gold)}
    question = more.pop("question", tasks.TASKS[task].question(language))
    return Record(f"{task}-{number}", task, language, post or f"post {number}", question, **more)


def row(item: Record, predicted, explanation=None) -> dict:
    status = "no_label" if predicted is None else "ok" if explanation else "no_explanation"
    return item.to_dict() | {"parsed_label": predicted, "parsed_explanation": explanation, "parse_status": status}


def random_rows(task: str, count: int, seed: int, failures: float = 0.1) -> list[dict]:
    """Answers right about half the time, gold missing the last class, predictions using it."""
    rng, keys = random.Random(seed), tasks.TASKS[task].keys
    rows = []
    for number in range(count):
        gold = rng.sample(keys[:-1], 1 if tasks.TASKS[task].arity == "single" else rng.choice([1, 1, 2, 3]))
        said = [key for key in gold if rng.random() < 0.6] or [rng.choice(keys)]
        if len(gold) > 1 or tasks.TASKS[task].arity == "multi":
            said += [key for key in keys if key not in said and rng.random() < 0.08]
            ordered = [key for key in keys if key in said]
            label = None if rng.random() < failures else ordered
            rows.append(row(record(number, task, gold), label))
        else:
            rows.append(row(record(number, task, gold[0]), None if rng.random() < failures else said[0]))
    return rows


def sets(rows) -> list[tuple[set[str], set[str]]]:
    """(gold, predicted) label sets per row."""
    both = []
    for item in rows:
        gold = {item["label"]} if "label" in item else set(item["labels"])
        said = item["parsed_label"] or []
        both.append((gold, {said} if isinstance(said, str) else set(said)))
    return both


def by_definition(task: str, pairs) -> dict[str, float]:
    """The scores, from their definitions, one class and one row at a time."""
    keys, f1, support, pooled = tasks.TASKS[task].keys, {}, {}, [0, 0, 0]
    for key in keys:
        hit = sum(key in gold and key in said for gold, said in pairs)
        wrong = sum(key not in gold and key in said for gold, said in pairs)
        missed = sum(key in gold and key not in said for gold, said in pairs)
        f1[key] = 2 * hit / (2 * hit + wrong + missed) if hit else 0.0
        support[key] = hit + missed
        pooled = [a + b for a, b in zip(pooled, (hit, wrong, missed), strict=True)]
    present = [key for key in keys if support[key]]
    scores = {
        "weighted_f1": sum(f1[key] * support[key] for key in keys) / sum(support.values()),
        "macro_f1": sum(f1[key] for key in present) / len(present),
    }
    exact = sum(gold == said for gold, said in pairs) / len(pairs)
    if tasks.TASKS[task].arity == "single":
        return scores | {"micro_f1": exact, "accuracy": exact}
    samples = [2 * len(gold & said) / (len(gold) + len(said)) for gold, said in pairs]
    micro = 2 * pooled[0] / (2 * pooled[0] + pooled[1] + pooled[2])
    return scores | {"micro_f1": micro, "exact_match": exact, "samples_f1": sum(samples) / len(samples)}


@pytest.mark.parametrize("task", ["suicide_risk", "imhi_sad", "cognitive_distortion", "cognitive_pathway"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_their_definitions(task, seed):
    rows = random_rows(task, 90, seed)
    entry = evaluate(rows, draws=2)[task]
    for name, value in by_definition(task, sets(rows)).items():
        assert entry[name] == pytest.approx(value, abs=1e-12), name
    assert entry["n"] == 90
    assert entry["parse_failure_rate"] == sum(item["parsed_label"] is None for item in rows) / 90 > 0


def test_scores_equal_scikit_learn():
    rows = random_rows("imhi_sad", 120, 2)
    entry, keys = evaluate(rows, draws=2)["imhi_sad"], tasks.TASKS["imhi_sad"].keys
    gold, said = [item["label"] for item in rows], [item["parsed_label"] or "unread" for item in rows]
    assert entry["accuracy"] == accuracy_score(gold, said)
    assert entry["micro_f1"] == pytest.approx(f1_score(gold, said, average="micro"))
    assert entry["weighted_f1"] == pytest.approx(f1_score(gold, said, average="weighted", zero_division=0.0))
    assert entry["macro_f1"] == pytest.approx(f1_score(gold, said, average="macro", labels=sorted(set(gold))))
    classes = precision_recall_fscore_support(gold, said, labels=keys, zero_division=0.0)
    for key, *expected in zip(keys, *classes, strict=True):
        found = entry["per_class"][key]
        assert [found["precision"], found["recall"], found["f1"], found["support"]] == pytest.approx(expected)
        assert found["predicted"] == said.count(key)

    rows = random_rows("cognitive_distortion", 120, 3)
    entry, keys = evaluate(rows, draws=2)["cognitive_distortion"], tasks.TASKS["cognitive_distortion"].keys
    gold, said = (
        np.array([[key in part for key in keys] for part in parts]) for parts in zip(*sets(rows), strict=True)
    )
    for average in ("micro", "weighted", "samples"):
        assert entry[f"{average}_f1"] == pytest.approx(f1_score(gold, said, average=average, zero_division=0.0))
    assert entry["macro_f1"] == pytest.approx(f1_score(gold[:, :-1], said[:, :-1], average="macro", zero_division=0.0))


def test_an_unread_answer_is_a_wrong_answer():
    gold, said = ["high", "high", "low", "low"], ["high", None, "low", "low"]
    rows = [row(record(i, "suicide_risk", g), s) for i, (g, s) in enumerate(zip(gold, said, strict=True))]
    entry = evaluate(rows)["suicide_risk"]
    assert (entry["n"], entry["accuracy"], entry["micro_f1"], entry["parse_failure_rate"]) == (4, 0.75, 0.75, 0.25)
    assert entry["positive_class"] == "high"
    assert entry["positive_f1"] == pytest.approx(2 / 3)
    assert entry["weighted_f1"] == entry["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert entry["per_class"]["high"] == pytest.approx(
        {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2, "predicted": 1}
    )
    assert entry["parse_status"] == {"no_explanation": 3, "no_label": 1}
    nothing = evaluate([row(item, None) for item in (record(0, "suicide_risk", "high"), record(1, "imhi_sad", "work"))])
    assert all(nothing[task][name] == 0 for task in nothing for name in AVERAGES)
    json.dumps(nothing, allow_nan=False)


def test_rows_are_matched_by_id():
    rows = random_rows("suicide_risk", 40, 4) + random_rows("cognitive_distortion", 40, 5)
    records = [Record.from_dict(item, allow_extra=True) for item in rows]
    straight = evaluate(rows, draws=20)
    mixed = random.Random(0).sample(rows, len(rows))
    assert list(evaluate(mixed, records, draws=20)) == list(straight) == ["suicide_risk", "cognitive_distortion"]
    for task, entry in evaluate(mixed, records, draws=20).items():
        assert entry == straight[task]
    for task, entry in evaluate(mixed, draws=20).items():
        assert all(entry[name] == pytest.approx(straight[task][name]) for name in AVERAGES)


def test_an_absent_row_is_a_wrong_answer_and_others_are_refused():
    records = [record(i, "suicide_risk", "high") for i in range(4)]
    rows = [row(item, "high") for item in records]
    entry = evaluate(rows[:3], records)["suicide_risk"]
    assert (entry["n"], entry["accuracy"], entry["parse_failure_rate"]) == (4, 0.75, 0.25)
    assert entry["parse_status"] == {"no_explanation": 3, "missing": 1}
    for bad_rows, bad_records, message in (
        (rows, records[:3], "'suicide_risk-3' is answered but not among"),
        ([*rows, rows[1]], None, "'suicide_risk-1' is answered twice"),
        (rows, [*records, record(1, "suicide_risk", "high", post="x")], "'suicide_risk-1' is given twice"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(bad_rows, bad_records)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_every_label_spelling_survives_the_way_to_the_score(task):
    """Upstream's scorers lose 142 of 684 SAD and 107 of 625 CAMS golds to a second spelling of some labels."""
    for language in tasks.TASKS[task].languages:
        rows = []
        for number, key in enumerate(tasks.TASKS[task].keys):
            item = record(number, task, key if tasks.TASKS[task].arity == "single" else [key], language=language)
            parsed = tasks.parse(task, language, item.answer())
            assert parsed.labels
            rows.append(row(item, parsed.labels[0] if tasks.TASKS[task].arity == "single" else list(parsed.labels)))
        entry = evaluate(rows, draws=2)[task]
        assert entry["n"] == len(tasks.TASKS[task].keys)
        assert all(entry[name] == 1 for name in AVERAGES)
        assert entry["ci95"] == ([1, 1] if len(rows) >= MIN_POSTS else [0, 1])


def test_no_gold_is_lost_to_a_second_spelling(tmp_path):
    """Counts of upstream's SAD and CAMS test files: the golds its scorer cannot map (142 "emotion turmoil" and "other
    stress causes", 107 "no causes") stay in, and an answer in its scorer's spelling is wrong, not absent."""
    for name, lost, count in (
        ("sad", {"emotion": "emotional turmoil", "other": None}, 684),
        ("cams", {"none": None}, 625),
    ):
        task, unmapped = tasks.TASKS[f"imhi_{name}"], {"sad": 142, "cams": 107}[name]
        mapped = [key for key in task.keys if key not in lost]
        golds = [list(lost)[i % len(lost)] if i < unmapped else mapped[i % len(mapped)] for i in range(count)]
        lines = [f'"Consider this post: ""post {i}"" Question: {task.question("en")}","{task.sentence([gold], "en")} '
                 f'Reasoning: because {i}."' for i, gold in enumerate(golds)]  # fmt: skip
        folder = tmp_path / "instruction_data" / {"sad": "SAD", "cams": "CAMS"}[name]
        folder.mkdir(parents=True)
        (folder / "train.csv").write_text("query,gpt-3.5-turbo\n" + "\n".join(lines) + "\n", encoding="utf-8")
        records = load_upstream(tmp_path, [task.name])
        assert [r.label for r in records] == golds
        rows = []
        for item in records:
            text = item.answer()
            if item.label == "emotion":
                text = text.replace("emotion turmoil", "emotional turmoil")
            parsed = tasks.parse(task, "en", text)
            rows.append(row(item, parsed.labels and parsed.labels[0], parsed.explanation))
        entry = evaluate(rows, records, draws=2)[task.name]
        wrong = golds.count("emotion")
        assert (entry["n"], sum(c["support"] for c in entry["per_class"].values())) == (count, count)
        assert entry["accuracy"] == pytest.approx(1 - wrong / count)
        assert sum(entry["per_class"][key]["support"] for key in lost) == unmapped
        if wrong:
            assert entry["confusion"]["emotion"] == dict.fromkeys(task.keys, 0) | {"unread": wrong}


def test_published_floors():
    """reference/paper.md's arithmetic for the two Chinese test sets: always "high", always "labeling"."""
    gold = ["high"] * 124 + ["low"] * 126
    entry = evaluate([row(record(i, "suicide_risk", key), "high") for i, key in enumerate(gold)], draws=2)[
        "suicide_risk"
    ]
    assert (round(100 * entry["positive_f1"], 1), entry["accuracy"]) == (66.3, 0.496)
    counts = (14, 29, 77, 6, 30, 133, 69, 2, 14, 386, 37, 6)
    labels = [key for key, n in zip(tasks.TASKS["cognitive_distortion"].keys, counts, strict=True) for _ in range(n)]
    golds = [labels[i::682] for i in range(682)]
    rows = [row(record(i, "cognitive_distortion", gold), ["labeling"]) for i, gold in enumerate(golds)]
    entry = evaluate(rows, draws=2)["cognitive_distortion"]
    assert [round(100 * entry[name], 2) for name in AVERAGES] == [34.75, 51.99, 6.02]


def test_languages_are_told_apart():
    rows = [row(record(i, "suicide_risk", "high", language="en"), "high") for i in range(3)]
    rows += [row(record(i, "suicide_risk", "low", language="zh"), said) for i, said in ((3, "high"), (4, None))]
    parts = evaluate(rows)["suicide_risk"]["by_language"]
    assert {k: (v["n"], v["accuracy"], v["parse_failure_rate"]) for k, v in parts.items()} == {
        "en": (3, 1.0, 0.0), "zh": (2, 0.0, 0.5)
    }  # fmt: skip


def test_pathway_levels():
    gold = [["A1", "A2"], ["B1"], ["C1", "D1"]]
    said = [["A1", "A3"], ["B2", "C1"], None]
    pairs = zip(gold, said, strict=True)
    rows = [row(record(i, "cognitive_pathway", g), s) for i, (g, s) in enumerate(pairs)]
    levels = evaluate(rows, draws=2)["cognitive_pathway"]["levels"]
    assert levels["child"] == pytest.approx({"precision": 1 / 4, "recall": 1 / 5, "f1": 2 / 9})
    assert levels["parent"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})
    assert levels["pooled"] == pytest.approx({"precision": 3 / 7, "recall": 3 / 9, "f1": 6 / 16})


@pytest.mark.parametrize("task", ["imhi_multiwd", "cognitive_distortion"])
def test_intervals_come_from_resampled_posts(task):
    """Every draw repeated by hand: take posts with replacement, all rows of each, and score them."""
    rows = random_rows(task, 60, 6)
    posts = [f"post {i % 25:02d}" for i in range(60)]
    rows = [item | {"post": post} for item, post in zip(rows, posts, strict=True)]
    entry, pairs = evaluate(rows, draws=40, seed=9)[task], sets(rows)
    times = np.random.default_rng(9).multinomial(25, [1 / 25] * 25, size=40)
    drawn = {name: [] for name in AVERAGES}
    for counts in times:
        sample = [pair for post, pair in zip(posts, pairs, strict=True) for _ in range(counts[int(post[-2:])])]
        for name in AVERAGES:
            drawn[name].append(by_definition(task, sample)[name])
    for name in AVERAGES:
        assert entry["ci95_by_metric"][name] == pytest.approx(np.percentile(drawn[name], [2.5, 97.5]).tolist())
    assert entry["ci95"] == entry["ci95_by_metric"]["weighted_f1"]
    assert evaluate(rows, draws=40, seed=9) == evaluate(rows, draws=40, seed=9)
    assert entry["ci95"] != evaluate(rows, draws=40, seed=10)[task]["ci95"]


def test_intervals_narrow_with_more_posts():
    widths = []
    for count in (50, 800):
        entry = evaluate(random_rows("suicide_risk", count, 7))["suicide_risk"]
        low, high = entry["ci95"]
        assert low < entry["weighted_f1"] < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6  # about 4, the root of 16


def test_explanation_checks():
    post = "I feel tired. Nothing helps any more. The bus was late."
    spans = {"cues": ((0, 12), (14, 36)), "decoys": ((38, 54),)}  # "I feel tired", "Nothing helps any more", the bus
    said = [
        'The poster writes "I feel tired," and "Nothing helps any more".',
        'The poster says "I feel tired" and "The bus was late".',
        'Shown by "I feel so tired".',
        "The poster seems sad.",
        None,
    ]
    rows = [row(record(i, "suicide_risk", "high", post=post, **spans), "high", text) for i, text in enumerate(said)]
    rows.append(row(record(9, "suicide_risk", "high", post="很难过，睡不着"), "high", "提到“很难过”和「睡不着」。"))
    found = evaluate(rows, draws=2)["suicide_risk"]["explanation"]
    assert found.pop("overlap") == {}
    assert (found.pop("median_characters"), found.pop("reference_median_characters")) == (27, None)
    assert found == pytest.approx({
        "n": 5, "rate": 5 / 6, "with_quote_rate": 4 / 5, "quotes_verbatim_rate": 6 / 7, "verbatim_rate": 3 / 4,
        "quotes_grounded_rate": 1.0,  # "I feel so tired" is one word away
        "cue_n": 5, "cue_recall": 3 / 10, "cue_citation_accuracy": 1 / 5, "decoy_rate": 1 / 5,
    })  # fmt: skip
    plain = evaluate([row(record(0, "suicide_risk", "high"), None)], draws=2)["suicide_risk"]["explanation"]
    assert plain.pop("overlap") == {}
    assert plain["n"] == plain["rate"] == plain["cue_n"] == 0
    assert {value for key, value in plain.items() if key not in ("n", "rate", "cue_n")} == {None}
    assert quotes("“甲，”‘乙’『丙』 \"d e.\" it's, isn't it? “”「 」") == ["甲", "乙", "丙", "d e"]


# --- baselines ---


def cue_records(count: int, seed: int, split: str, language: str = "en") -> list[Record]:
    """The risk is high where a cue phrase stands among filler."""
    rng = random.Random(seed)
    filler = {
        "en": ["the bus was late", "we had soup", "it rained again"],
        "zh": ["公交车晚点了", "喝了汤", "又下雨了"],
    }
    cues = {"en": {"high": "no way out", "low": "all fine"}, "zh": {"high": "没有出路", "low": "都还好"}}
    items = []
    for number in range(count):
        label = rng.choice(["high", "high", "low"])
        clauses = [*filler[language], cues[language][label]]
        rng.shuffle(clauses)
        items.append(record(f"{split}{language}{number}", "suicide_risk", label, post=", ".join(clauses),
                            language=language, split=split))  # fmt: skip
    return items


def test_baselines_are_scored_as_a_model_is():
    train, test = cue_records(60, 0, "train"), cue_records(40, 1, "test")
    found = floors(train, test)["suicide_risk"]
    assert Counter(item.label for item in train).most_common(1)[0][0] == "high"
    entry = evaluate([row(item, "high") for item in test], draws=2)["suicide_risk"]
    shared = ("n", *AVERAGES, "accuracy", "positive_f1")
    assert {name: found["majority"][name] for name in shared} == {name: entry[name] for name in shared}
    assert found["tfidf_logreg"]["weighted_f1"] == 1.0
    assert found["majority"]["weighted_f1"] < 0.7


def test_baseline_learns_multi_label_posts():
    keys, rng = tasks.TASKS["cognitive_distortion"].keys[:4], random.Random(0)
    words = dict(zip(keys, ("甲乙丙", "丁戊己", "庚辛壬", "子丑寅"), strict=True))
    items = []
    for number in range(160):
        chosen = rng.sample(keys, rng.choice([1, 1, 2]))
        gold = [key for key in keys if key in chosen]
        post = "，".join(rng.sample([words[key] for key in gold] + ["天气好", "吃饭了", "坐公交"], len(gold) + 3))
        items.append(record(number, "cognitive_distortion", gold, post=post, language="zh"))
    found = floors(items[:120], items[120:])["cognitive_distortion"]
    assert found["tfidf_logreg"]["micro_f1"] > 0.95
    assert found["tfidf_logreg"]["exact_match"] > 0.9  # second labels are found, none is added
    most = Counter(key for item in items[:120] for key in item.gold).most_common(1)[0][0]
    expected = evaluate([row(item, [most]) for item in items[120:]], draws=2)["cognitive_distortion"]
    assert all(found["majority"][name] == expected[name] for name in AVERAGES)


def test_each_language_and_question_has_its_own_baseline():
    english = [record(f"e{i}", "suicide_risk", "high", language="en") for i in range(9)]
    chinese = [record(f"z{i}", "suicide_risk", "low", language="zh") for i in range(3)]
    assert floors(english + chinese, english[:2] + chinese[:2])["suicide_risk"]["majority"]["accuracy"] == 1.0
    assert floors(english, chinese)["suicide_risk"]["majority"]["accuracy"] == 0.0  # none of its own: any language
    task = tasks.TASKS["imhi_multiwd"]
    asked = [
        record(f"{number}-{n}", "imhi_multiwd", "yes" if n % 2 else "no", post=f"post {number}", question=question)
        for number in range(6)
        for n, question in enumerate(task.all_questions("en"))
    ]
    found = floors(asked[:18], asked[18:])["imhi_multiwd"]
    assert found["majority"]["accuracy"] == found["tfidf_logreg"]["accuracy"] == 1.0  # the question alone tells


def test_small_or_one_sided_training_sets_do(recwarn):
    for count in (1, 2, 3):
        found = floors([record(i, "suicide_risk", "low") for i in range(count)], [record(9, "suicide_risk", "high")])
        assert found["suicide_risk"]["tfidf_logreg"]["accuracy"] == 0.0
    mixed = [record(0, "suicide_risk", "low"), record(1, "suicide_risk", "high"), record(2, "imhi_sad", "work")]
    assert list(floors(mixed, mixed)) == ["suicide_risk", "imhi_sad"]
    # What the collector of garbage says of other tests' files is none of it.
    assert not [one for one in recwarn.list if not issubclass(one.category, ResourceWarning)]
    with pytest.raises(InputError, match="task imhi_sad: no training record"):
        floors(mixed[:2], mixed)


# --- files and tables ---


def test_generations_are_read_back(tmp_path):
    rows = random_rows("suicide_risk", 5, 8) + random_rows("cognitive_distortion", 5, 8)
    rows[0]["post"] = "one\u2028two"  # a line separator to Python, not to JSONL
    path = tmp_path / "generations.jsonl"
    path.write_text("\n\n".join(json.dumps(item, ensure_ascii=False) for item in rows), encoding="utf-8-sig")
    assert read_generations(path) == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parsed_label": "hihg"}, r":2: record 'suicide_risk-0': parsed_label: .*did you mean 'high'"),
        ({"parsed_label": ["high"]}, r":2: .* is not one label or null"),
        ({"label": "hihg"}, r":2: record 'suicide_risk-0'.*unknown label 'hihg'"),
        ({"post": " "}, r":2: record 'suicide_risk-0': post: is empty"),
        ({"task": "cognitive_distortion", "label": None, "labels": ["labeling"], "parsed_label": "labeling"}, "a list"),
        ({"task": "cognitive_distortion", "label": None, "labels": ["labeling"], "parsed_label": []}, "no label"),
    ],
)
def test_damaged_rows_are_named(tmp_path, changes, message):
    good = row(record(1, "suicide_risk", "high"), "high")
    bad = row(record(0, "suicide_risk", "high"), "high") | changes
    path = tmp_path / "generations.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_generations(path)
    with pytest.raises(InputError):
        evaluate([bad])


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "generations.jsonl"
    for data, message in (
        (b"", "holds no row"),
        (b"{}\n", ":1: field 'id' is missing"),
        (b"[]\n", ":1: expected a JSON object"),
        (b"{\n", ":1: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (json.dumps(record(0, "suicide_risk", "high").to_dict()).encode(), ":1: .*'parsed_label' is missing"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_generations(path)
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file; make it with"):
        read_generations(tmp_path / "absent.jsonl")


def test_table_shows_scores_beside_floors():
    items = cue_records(30, 0, "train", "en") + cue_records(30, 0, "train", "zh")
    result = evaluate([row(item, "high" if n % 7 else None) for n, item in enumerate(items)])
    assert all(entry["floors"] == {} for entry in result.values())
    result["suicide_risk"]["floors"] = floors(items, items)["suicide_risk"]
    json.dumps(result, allow_nan=False)
    out = io.StringIO()
    Console(file=out, width=160).print(format_table(result))
    lines = [line.removeprefix(" ").replace("│", "") for line in out.getvalue().splitlines()]
    entry = result["suicide_risk"]
    line = next(line for line in lines if line.startswith("suicide_risk"))
    assert line.split() == [
        "suicide_risk", "60", f"{entry['weighted_f1']:.3f}", "{:.3f}–{:.3f}".format(*entry["ci95"]),
        f"{entry['micro_f1']:.3f}", f"{entry['macro_f1']:.3f}", "15.0%",
        f"{entry['floors']['majority']['weighted_f1']:.3f}", "1.000",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines if line.startswith("  ")][:2] == [["en", "30"], ["zh", "30"]]


def test_a_floor_is_compared_record_by_record_whatever_the_order():
    """A floor that says what the model says does not differ from it, also where the answers come in another order."""
    rows = random_rows("suicide_risk", 60, seed=3, failures=0)
    answers, task = [generated(item) for item in rows], tasks.get_task("suicide_risk")
    test = [answer.record for answer in answers]
    floor = indicator(task, [answer.labels for answer in answers])
    found = against_floor(answers[::-1], test, floor, draws=50)
    assert found["mcnemar"] == {"only_first": 0, "only_second": 0, "p": 1.0}
    assert all(one["difference"] == 0 for one in found["metrics"].values())
    other = against_floor(answers, test, floor[::-1], draws=50)
    assert other["mcnemar"]["only_first"] + other["mcnemar"]["only_second"] > 0
