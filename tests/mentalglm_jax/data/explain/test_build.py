"""`data build` against a real server and a proxy that spoils its answers: retries, cache, budget, checks, files."""

import hashlib
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.explain import build as room
from mentalglm_jax.data.explain.build import build, load_build_recipe
from mentalglm_jax.data.explain.endpoint import OpenAITeacher
from mentalglm_jax.data.explain.prompts import load_prompts, pick_examples
from mentalglm_jax.data.explain.teacher import AnswerCache, TeacherConfig
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.sources import load_upstream
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.data.explain.conftest import post, records
from tests.mentalglm_jax.endpoint import behaving, completion, endpoint, failing, oracle, spoiling


def quiet(*_):
    pass


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def test_build_writes_a_data_set_and_a_second_time_costs_nothing_and_changes_nothing(made, tmp_path):
    with endpoint() as server:
        recipe = made(server.url)
        manifest = build(recipe, quiet)
        assert len(server.requests) == 12 and manifest["teacher"] == {"asked": 12}
        first = hashes(recipe.out)
        again = build(recipe, quiet)
        assert len(server.requests) == 12 and again["teacher"] == {"cached": 12}
        assert hashes(recipe.out) == first
        sent = server.requests[0]
    assert sent["path"] == "/v1/chat/completions" and sent["model"] == "oracle" and sent["temperature"] == 0.7
    assert manifest["records"] == {"asked": 12, "accepted": 12, "rejected": 0, "filtered": 0, "too_long": 0}
    few = {"label_recoverable": None}  # six of a task are too few to learn from
    assert {name: entry["rate"] for name, entry in manifest["checks"].items()} == dict.fromkeys(room.CHECKS, 1.0) | few
    assert manifest["checks"]["label_recoverable"] == {"passed": 0, "n": 0, "rate": None, "by_task": {}}
    by_hand = hashes(recipe.out)
    assert manifest["files"] == {n: h for n, h in by_hand.items() if n not in ("README.md", "manifest.json")}
    assert str(tmp_path) not in (recipe.out / "manifest.json").read_text() + (recipe.out / "README.md").read_text()

    got = read_records(recipe.out / "records" / "train.jsonl")
    assert got == read_records(recipe.out / "data" / "train.parquet") and len(got) == 10
    one = next(r for r in got if r.id == "r1")
    assert one.post == post(1) and one.labels == ("labeling", "mind_reading") and f"“{post(1)[:12]}”" in one.explanation
    rows = json.loads((recipe.out / "alpaca" / "dev.json").read_text())
    assert {frozenset(row) for row in rows} == {frozenset(("instruction", "input", "output"))}
    read_back = load_upstream(recipe.out, ["c_imhi"])
    said = [sorted((r.post, sorted(r.gold), r.explanation) for r in rows) for rows in (read_back, got)]
    assert [one for one in said[0] if one in said[1]] == said[1] and len(said[0]) == 12
    readme = (recipe.out / "README.md").read_text()
    header = yaml.safe_load(readme.split("---")[1])
    assert [entry["split"] for entry in header["configs"][0]["data_files"]] == ["validation", "train"]
    for words in ("12 of 12 explanations", "| quotes_the_post | 12 | 12 | 100.0% | yes |",
                  "| label_recoverable | 0 | 0 | too few | no |", "prompts: zh version 1",
                  "not a diagnosis", manifest["files"]["data/train.parquet"]):  # fmt: skip
        assert words in readme


def test_datasets_opens_the_directory(made):
    import datasets

    with endpoint() as server:
        recipe = made(server.url)
        build(recipe, quiet)
    loaded = datasets.load_dataset(str(recipe.out), cache_dir=str(recipe.out.parent / "hf"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 10, "validation": 2}
    assert loaded["train"][0]["post"] == post(0)


FAULTS = ["429", "500", "503", "truncated", "cut", "empty"]


def test_a_spoiled_answer_is_asked_for_again(made):
    with endpoint() as server, spoiling(server.url, FAULTS) as url:
        manifest = build(made(url), quiet)
    assert manifest["records"]["accepted"] == 12
    stats = Counter(manifest["teacher"])
    assert (stats["asked"], stats["rate limit"], stats["server error"]) == (12, 1, 2)
    assert (stats["malformed answer"], stats["no connection"], stats.total()) == (2, 1, 12 + len(FAULTS))


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(made):
    """On a busy machine others may not come in time either."""
    with endpoint() as server, spoiling(server.url, ["timeout"]) as url:
        manifest = build(made(url, teacher={"timeout": 0.5, "retries": 50}), quiet)
    assert manifest["records"]["accepted"] == 12 and manifest["teacher"]["asked"] == 12
    assert manifest["teacher"].keys() == {"asked", "timeout"} and manifest["teacher"]["timeout"] >= 1


def test_the_wrong_language_is_caught_and_asked_for_once_more(made):
    with endpoint() as server, spoiling(server.url, ["english"]) as url:
        manifest = build(made(url, teacher={"concurrency": 1}), quiet)
        assert [asked["seed"] for asked in server.requests] == [0, 1, *[0] * 11]
    assert manifest["records"]["accepted"] == 12 and manifest["attempts"] == {"1": 11, "2": 1}
    with endpoint() as server, spoiling(server.url, ["english"] * 12) as url:
        manifest = build(made(url, attempts=1, seed=5), quiet)
    assert manifest["records"]["accepted"] == 0 and manifest["checks"]["right_language"]["passed"] == 0


@pytest.mark.parametrize(
    ("faults", "retries", "message"),
    [
        (["500"] * 99, 2, r"gave no answer in 3 tries, last: server error \(500: no\); what was answered is kept"),
        (["401"], 2, r"refused the request \(401: no\); check model, key and base_url"),
        (["400 bad the\nmodel  is gone"], 2, r"refused the request \(400: the model is gone\); check"),
        (["400 bad " + "long " * 99], 2, r"refused the request \(400: (long ){39}long…\); check"),
        (["400 bad post"], 2, r"refused the request \(400, without a reason\); check"),
        (["402"], 2, r"no money or quota left at http.* \(429: no\)"),
    ],
)
def test_a_teacher_that_fails_ends_the_build_in_one_line(made, faults, retries, message):
    with endpoint() as server, spoiling(server.url, faults) as url:
        recipe = made(url, teacher={"retries": retries, "concurrency": 1})
        with pytest.raises(RunError, match=message):
            build(recipe, quiet)
    assert not recipe.out.exists()


@pytest.mark.parametrize(
    "fault",
    [
        "null",
        "half",
        "no choices",
        "400 content_filter no",
        "400 content_policy_violation no",
        "400 bad Content Exists Risk",
    ],
)
def test_a_post_that_the_filter_refuses_is_rejected_and_counted_and_asked_once(made, fault):
    with endpoint() as server, spoiling(server.url, [fault]) as url:
        recipe = made(url, attempts=1)
        manifest = build(recipe, quiet)
        first = hashes(recipe.out)
        assert manifest["teacher"] == {"asked": 12, "filtered": 1}
        seen = len(server.requests)
        assert build(recipe, quiet)["teacher"] == {"cached": 12} and len(server.requests) == seen
    assert hashes(recipe.out) == first
    assert manifest["records"] == {"asked": 12, "accepted": 11, "rejected": 1, "filtered": 1, "too_long": 0}
    (row,) = [json.loads(line) for line in (recipe.out / "rejected.jsonl").read_text().splitlines()]
    assert row["finish"] == "content_filter" and "right_length" in row["failed"]
    assert "1 posts were refused by the teacher's content filter" in (recipe.out / "README.md").read_text()


def test_when_the_teacher_fails_what_is_under_way_is_kept_and_nothing_more_is_asked(made):
    all_there, failed = threading.Barrier(3), threading.Event()

    def refuse(asked):
        all_there.wait(600)
        failed.set()
        return failing(401, {"error": {"message": "no"}})(asked)

    def answer(asked):
        if not failed.is_set():
            all_there.wait(600)
            time.sleep(5)  # while the refusal is read
        return completion(asked, oracle(asked["messages"]))

    with behaving(refuse, default=answer) as server:
        recipe = made(server.url, teacher={"concurrency": 3})
        with pytest.raises(RunError, match="401: no"):
            build(recipe, quiet)
        assert len(server.requests) == 3 and len(list(recipe.cache.glob("??/*.json"))) == 2


def test_a_build_that_stopped_never_pays_twice(made):
    with endpoint() as server:
        with spoiling(server.url, [""] * 5 + ["401"]) as url:
            recipe = made(url, teacher={"concurrency": 1})
            with pytest.raises(RunError, match="401"):
                build(recipe, quiet)
            assert len(server.requests) == 5
            manifest = build(recipe, quiet)
        assert len(server.requests) == 12 and manifest["teacher"] == {"asked": 7, "cached": 5}
        bodies = [json.dumps(asked["messages"]) for asked in server.requests]
        assert len(set(bodies)) == 12


def test_a_budget_is_never_passed_and_counts_what_is_cached(made):
    with endpoint() as server:
        cache = made(server.url).cache
        build(made(server.url), quiet)
        used = sum(AnswerCache(cache).tokens())
        recipe = made(server.url, seed=9, teacher={"max_total_tokens": used * 3 // 2})
        with pytest.raises(RunError, match=r"the budget is spent: .* raise teacher\.max_total_tokens"):
            build(recipe, quiet)
        assert used < sum(AnswerCache(cache).tokens()) <= used * 3 // 2
        seen = len(server.requests)
        with pytest.raises(RunError, match="the budget is spent"):
            build(recipe, quiet)
        assert len(server.requests) == seen
        with pytest.raises(RunError, match=r"the budget is spent: \d+ tokens \(\d+\.\d\d\) used"):
            build(made(server.url, seed=9, teacher={"max_spend": 0.01, "input_price": 5.0}), quiet)


def billed(server):
    """What the server of ``endpoint`` counted for all that it was asked."""
    chats = [one["messages"] for one in server.requests]
    return sum(sum(len(message["content"]) for message in chat) + len(oracle(chat)) for chat in chats)


def test_what_was_paid_for_answers_of_no_use_counts_against_the_budget(made):
    with endpoint() as server, spoiling(server.url, ["empty"] * 99) as url:
        cap = {"max_total_tokens": 20_000, "retries": 98}
        with pytest.raises(RunError, match="the budget is spent"):
            build(made(url, teacher=cap), quiet)
        seen = len(server.requests)
        assert seen > 2 and sum(AnswerCache(made(url).cache).tokens()) == billed(server) <= 20_000
        with pytest.raises(RunError, match="the budget is spent"):
            build(made(url, teacher=cap), quiet)
        assert len(server.requests) == seen


def test_what_the_server_does_not_count_costs_what_was_reserved(made):
    with endpoint() as server, spoiling(server.url, ["no usage"] * 12) as url:
        recipe = made(url, teacher={"max_tokens": 333})
        build(recipe, quiet)
    sent = [message["content"] for one in server.requests for message in one["messages"]]
    assert AnswerCache(recipe.cache).tokens() == (sum(len(text.encode()) + 16 for text in sent), 12 * 333)


def test_as_many_requests_at_once_as_allowed(made):
    running, most, four = [], [], threading.Event()

    def slow(messages):
        running.append(1)
        most.append(len(running))
        if len(running) == 4:
            four.set()
        assert four.wait(600)
        time.sleep(0.1)  # for a fifth that there must not be
        running.pop()
        return oracle(messages)

    with endpoint(slow) as server:
        build(made(server.url, teacher={"concurrency": 4}), quiet)
    assert max(most) == 4


def test_what_is_refused_is_listed_with_its_reasons(made):
    def careless(messages):
        text = oracle(messages)
        return text.replace(post(0)[:12], "编造出来的另外一句话") if post(0)[:12] in text else text

    with endpoint(careless) as server:
        recipe = made(server.url)
        manifest = build(recipe, quiet)
    (row,) = [json.loads(line) for line in (recipe.out / "rejected.jsonl").read_text().splitlines()]
    assert row["id"] == "r0" and row["failed"] == ["quotes_the_post"]
    assert manifest["checks"]["quotes_the_post"] == {
        "passed": 11, "n": 12, "rate": 0.9167, "by_task": {"cognitive_distortion": 1.0, "suicide_risk": 0.8333}
    }  # fmt: skip
    assert "r0" not in {r.id for r in read_records(recipe.out / "records" / "train.jsonl")}


def test_the_attempt_that_passes_what_is_required_is_taken(made):
    """The first answer fails only what is required, the second only what is not, and more of it."""

    def second_thoughts(messages):
        text = oracle(messages)
        asked[text] += 1
        if asked[text] == 1:
            return text.replace("推理：帖子里写道“", "推理：帖子里写道“编造出来的另外一句话")
        return text + "可以联系13812345678。" + "这与给定的标签一致。"

    asked = Counter()
    with endpoint(second_thoughts) as server:
        manifest = build(made(server.url, checks={"require": ["quotes_the_post"]}, examples_per_class=1), quiet)
    assert manifest["records"]["accepted"] == 12 and manifest["attempts"] == {"2": 12}
    assert manifest["checks"]["no_contacts"]["passed"] == manifest["checks"]["no_label_leak"]["passed"] == 0


def test_a_good_explanation_is_not_lost_for_resembling_a_refused_one(made):
    def alike(messages):
        label, _, text = oracle(messages).partition(" 推理：")
        quote = text[text.index("“") : text.index("”") + 1]
        if post(0)[:12] in quote:
            quote = "“编造出来的另外一句话”"  # refused
        return f"{label} 推理：帖子里写道{quote}，这段话直接体现了发帖人当时的处境和想法，符合相应的判断标准。"

    with endpoint(alike) as server:
        recipe = made(server.url)
        manifest = build(recipe, quiet)
    kept = [record.id for record in read_records(recipe.out / "records" / "train.jsonl")]
    assert kept == ["r1", "r2"]  # the first of each task that is not refused; r0 came before r2
    near = manifest["checks"]["not_near_duplicate"]
    assert (near["passed"], near["n"], manifest["checks"]["quotes_the_post"]["passed"]) == (2, 11, 11)
    rows = [json.loads(line) for line in (recipe.out / "rejected.jsonl").read_text().splitlines()]
    assert {row["id"]: row["failed"] for row in rows}["r0"] == ["quotes_the_post"]


def test_contact_details_never_reach_the_teacher(made, tmp_path):
    rows = records(12)
    write_records(
        tmp_path / "posts.jsonl", [Record.from_dict(r.to_dict() | {"post": r.post + "打13812345678"}) for r in rows]
    )
    with endpoint() as server:
        build(made(server.url), quiet)
    assert "13812345678" not in json.dumps(server.requests) and "[phone]" in json.dumps(server.requests)


def test_a_limit_takes_of_a_file_sorted_by_label_some_of_each(made, tmp_path):
    rows = [r for r in records(24) if r.task == "suicide_risk"]
    write_records(tmp_path / "posts.jsonl", sorted(rows, key=lambda r: r.label))
    with endpoint() as server:
        manifest = build(made(server.url, data={"root": tmp_path / "posts.jsonl", "limit": 4}), quiet)
    assert manifest["records"]["asked"] == 4
    assert manifest["counts"]["suicide_risk"]["train"]["labels"] == {"high": 2, "low": 2}


# --- prompts ---


def test_the_prompt_shows_criteria_two_examples_per_class_and_the_gold_label():
    prompts = load_prompts("zh")
    experts = [*records(16, 100, explanation="专家写道“可以”。"), *records(2, 0, explanation="“自己的”")]
    one = records(1)[0]
    examples = pick_examples(one, experts, 2, seed=0)
    assert Counter(example.label for example in examples) == {"high": 2, "low": 2}
    assert one.post not in [example.post for example in examples]
    assert [e.id for e in pick_examples(one, experts[::-1], 2, seed=0)] == [e.id for e in examples]
    assert [e.id for e in pick_examples(one, experts, 2, seed=1)] != [e.id for e in examples]
    chat = prompts.messages(one, examples)
    assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * 4, "user"]
    assert "- 高：" in chat[0]["content"] and "“”引用" in chat[0]["content"]
    assert one.post in chat[-1]["content"] and chat[-1]["content"].endswith("这个帖子体现了低自杀风险。")
    assert chat[2]["content"] == examples[0].answer()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_task_has_a_wording_and_every_criterion_a_label(language):
    prompts = load_prompts(language)
    for task in tasks.TASKS.values():
        if language in task.languages:
            labels = task.keys[:1]
            values = {"label": labels[0]} if task.arity == "single" else {"labels": labels}
            chat = prompts.messages(Record("x", task.name, language, "p {x}", task.question(language), **values), [])
            assert "p {x}" in chat[1]["content"] and task.sentence(labels, language) in chat[1]["content"]
    for name in ("suicide_risk", "suicide_level", "cognitive_distortion", "cognitive_pathway"):
        assert set(prompts.tasks[name].criteria) == set(tasks.TASKS[name].keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, r"own.yaml: version: Input should be a valid integer"),
        ({"sytem": "x"}, r"own.yaml: unknown key 'sytem' .did you mean 'system'"),
        ({"request": "{pots}"}, r"own.yaml: a wording holds an unknown place \{'pots'\}"),
        ({"language": "en"}, "own.yaml: is written for language 'en'"),
        ({"tasks": {"suicide_risk": {"role": "r", "criteria": {"hihg": "x"}}}}, "criteria: unknown label 'hihg'"),
        ({"tasks": {"suicide": {"role": "r"}}}, "unknown task 'suicide'"),
    ],
)
def test_a_damaged_wording_is_named(tmp_path, change, message):
    shipped = Path(room.__file__).parents[2] / "assets" / "prompts" / "zh.yaml"
    wording = yaml.safe_load(shipped.read_text(encoding="utf-8")) | change
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(wording, allow_unicode=True), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_prompts("zh", tmp_path / "own.yaml")


# --- recipe, local model, command ---


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["teacher.modle=x"], r"unknown key 'teacher.modle' \(did you mean 'model'\?\)"),
        (["data.lmit=3"], r"unknown key 'data.lmit' \(did you mean 'limit'\?\)"),
        (["atempts=3"], r"unknown key 'atempts' \(did you mean 'attempts'\?\)"),
        (
            ["checks.require=[states_gold_label, nice]"],
            "checks.require: unknown check 'nice'; known: ",
        ),
        (["cache=runs/c-imhi/cache"], "cache lies inside out"),
        (["seed"], "--set seed: write it as section.key=value"),
        (["seed.a=1"], "--set seed.a: seed is a plain value"),
    ],
)
def test_a_wrong_recipe_is_named(sets, message):
    with pytest.raises(InputError, match=message):
        load_build_recipe(Path(__file__).parents[4] / "configs" / "build" / "c-imhi.yaml", sets)


def test_what_is_not_ours_is_not_replaced_and_what_is_missing_is_named(made, tmp_path, monkeypatch):
    recipe = made("http://127.0.0.1:9/v1")
    recipe.out.mkdir()
    (recipe.out / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and not written by this command"):
        build(recipe, quiet)
    (recipe.out / "thesis.txt").unlink()
    write_records(tmp_path / "experts.jsonl", records(1, 100, explanation="“x”"))
    with pytest.raises(InputError, match="no expert example for task cognitive_distortion in 'zh'"):
        build(recipe, quiet)
    write_records(tmp_path / "experts.jsonl", records(2, 100))
    with pytest.raises(InputError, match="2 expert examples have no explanation"):
        build(recipe, quiet)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY, or give"):
        OpenAITeacher(TeacherConfig(model="x"), AnswerCache(tmp_path))


def test_a_damaged_answer_in_the_cache_is_asked_for_again(made):
    with endpoint() as server:
        recipe = made(server.url)
        build(recipe, quiet)
        broken = sorted(recipe.cache.rglob("*.json"))[0]
        broken.write_text('{"asked": {}, "answ')
        assert build(recipe, quiet)["teacher"] == {"asked": 1, "cached": 11}


def test_the_command_builds_and_prints_no_post(made, tmp_path, capfd):
    def call(*more):
        with pytest.raises(SystemExit) as stop:
            main(["data", "build", str(tmp_path / "recipe.yaml"), *more])
        return stop.value.code, *capfd.readouterr()

    with endpoint() as server:
        recipe = made(server.url).model_dump(mode="json")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        code, out, _ = call("--json")
        assert code == 0 and json.loads(out)["records"]["accepted"] == 12
        code, out, err = call()
        assert code == 0 and "12 of 12 explanations kept; teacher: cached 12" in out
        assert not any(post(n)[:8] in out + err for n in range(12))
        code, out, err = call("--set", "teacher.x=1")
        assert code == 2 and err.count("\n") == 1 and "unknown key 'teacher.x'" in err
