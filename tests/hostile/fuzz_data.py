"""What ``test_fuzz.py`` reads: data, answers, ratings, recipes, tasks and run directories."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mentalglm_jax.data.c_imhi import iter_c_imhi
from mentalglm_jax.data.conversations import read_conversations
from mentalglm_jax.data.explain.build import load_build_recipe
from mentalglm_jax.data.explain.review import SCALES, form_id, read_ratings
from mentalglm_jax.data.explain.teacher import Answer, AnswerCache
from mentalglm_jax.data.intake.tabular import open_tables
from mentalglm_jax.data.rationales import iter_cnsd
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.roots import record_files
from mentalglm_jax.data.sources import load_imhi, load_socialcd_3k, load_sos_hl_1k
from mentalglm_jax.data.written import check_replaceable
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer as Said
from mentalglm_jax.evaluate.answers import read_generations, read_label_scores
from mentalglm_jax.evaluate.calibrated import read_scalings
from mentalglm_jax.evaluate.human import human_ratings
from mentalglm_jax.evaluate.leaderboard import FORMATS, formatted, leaderboard_rows
from mentalglm_jax.inference.generate import open_partial
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.serve.requests import ApiError, prompt_of, read_request, wanted_of
from mentalglm_jax.text import tasks
from mentalglm_jax.text.task_files import read_tasks, tasks_text
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.metrics import _continued
from mentalglm_jax.train.recipe import load_recipe, what_it_is
from tests.hostile.foreign_files import RECORD
from tests.hostile.fuzzing import (
    Mutator,
    Reader,
    Readers,
    either,
    from_file,
    in_bytes,
    in_rows,
    in_values,
)
from tests.hostile.test_command_line import RECIPE
from tests.mentalglm_jax.own_tasks import OWN, definitions
from tests.mentalglm_jax.upstream import CD, GOOD, alpaca, cd_table, imhi_row, imhi_table, put, sos_table

READERS = Readers()
ROW = RECORD | {"cues": [[0, 3]], "parsed_label": "high", "parsed_explanation": "x", "parse_status": "ok"}
SCORED = RECORD | {"label_logprobs": {"high": -1.0, "low": -2.5}}
MOOD = RECORD | {"task": "mood", "label": "calm", "question": "How?", "task_definition": OWN["mood"]}
STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_split": "train",
         "_indices_data_files": None, "_output_all_columns": False}  # fmt: skip
SCORES = {"n": 4, "weighted_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.25, "ci95": [0.1, 0.9]}


# --- data, answers, reviews ---


@READERS.reads("records.jsonl")
def _records(place: Path) -> Reader:
    multi = RECORD | {"task": "cognitive_distortion", "language": "zh", "labels": [], "rationales": [[0, 1]]}
    multi["labels"] = [tasks.TASKS["cognitive_distortion"].keys[0]]
    del multi["label"]
    rows = (row | {"id": f"r{number}"} for number, row in enumerate((RECORD, ROW, MOOD, multi)))
    file = place / "r.jsonl"
    return Reader(in_rows(*rows), from_file(file, lambda: _forgetting(read_records, file, allow_extra=True)))


def _forgetting(read: Callable[..., object], *arguments: Any, **named: Any) -> object:
    """Tasks that an input makes known are not known to the next."""
    try:
        return read(*arguments, **named)
    finally:
        tasks.forget_added()


@READERS.reads("generations.jsonl")
def _generations(place: Path) -> Reader:
    return Reader(in_rows(ROW, ROW | {"id": "r2", "parsed_label": None}, MOOD | {"id": "r3", "parsed_label": "calm"}),
                  from_file(place / "g.jsonl", lambda: _forgetting(read_generations, place / "g.jsonl")))  # fmt: skip


@READERS.reads("label_scores.jsonl")
def _label_scores(place: Path) -> Reader:
    return Reader(in_rows(SCORED),
                  from_file(place / "s.jsonl", lambda: _forgetting(read_label_scores, place / "s.jsonl")))  # fmt: skip


@READERS.reads("an evaluation.json of a leaderboard")
def _evaluation(place: Path) -> Reader:
    entry = SCORES | {"floors": {"majority": SCORES, "tf-idf": SCORES}, "label_reading": SCORES | {"n": 3},
                      "data_set": "imhi", "explanation": {"n": 1}}  # fmt: skip

    def read() -> None:
        rows = leaderboard_rows([place], draws=10)
        for form in FORMATS:
            formatted(rows, form)

    sound = {"suicide_risk": entry, "imhi_dreaddit": entry | {"label_reading": None}}
    return Reader(in_values(sound), from_file(place / "evaluation.json", read))


@READERS.reads("an agreement.json of people")
def _agreement(place: Path) -> Reader:
    record = Record.from_dict(RECORD)
    write_records(place / "sample.jsonl", [record])
    scale = {"mean": 1.0, "ratings": 1, "fleiss_kappa": None, "items_rated_by_all": 1, "krippendorff_alpha": 0.5,
             "items_rated_twice": 0}  # fmt: skip
    counts = {"items": 1, "rated": 1, "accepted": 0, "agreement": dict.fromkeys(SCALES, scale)}
    sound = {"form": form_id([record]), "raters": ["A"], "accept_at": 2.0, **counts, "tasks": {"suicide_risk": counts}}
    said = [Said(record, record.gold, record.explanation, "ok")]
    return Reader(in_values(sound), from_file(place / "agreement.json", lambda: human_ratings(place, said)))


@READERS.reads("ratings of a form")
def _ratings(place: Path) -> Reader:
    sample = [Record.from_dict(RECORD | {"id": f"r{n}"}) for n in range(3)]
    form = form_id(sample)
    given = {one.id: dict.fromkeys(SCALES, 3) | {"comment": "=so"} for one in sample}
    ids = [one.id for one in sample]
    return Reader(in_values({"form": form, "rater": "A", "ratings": given}),
                  from_file(place / "a.json", lambda: read_ratings(place / "a.json", form, ids)))  # fmt: skip


@READERS.reads("a sheet of ratings")
def _sheet(place: Path) -> Reader:
    sample = [Record.from_dict(RECORD | {"id": f"r{n}"}) for n in range(3)]
    form, ids = form_id(sample), ["r0", "r1", "r2"]
    rows = [["form", "rater", "id", *SCALES, "comment"], *([form, "A", name, 1, 2, 3, 0, "'=so"] for name in ids)]
    text = "\n".join(",".join(map(str, row)) for row in rows).encode("utf-8-sig")
    return Reader(in_bytes(text), from_file(place / "a.csv", lambda: read_ratings(place / "a.csv", form, ids)))


def _table(place: Path, name: str, data: bytes) -> Reader:
    def read() -> None:
        (table,) = open_tables(place / name, ("post", "label"))
        for _ in table.rows(("post", "label")):
            pass

    return Reader(in_bytes(data), from_file(place / name, read))


@READERS.reads("a CSV table")
def _csv(place: Path) -> Reader:
    return _table(place, "t.csv", 'post,label\n"I like, rain.",good\n"a\nb",bad\n我,好\n'.encode())


@READERS.reads("a table of JSON")
def _json(place: Path) -> Reader:
    rows = [{"post": "I like rain.", "label": "good", "n": 1.5}, {"post": "我", "label": "坏", "n": None}]
    reader = _table(place, "t.json", b"")
    return Reader(in_values(rows), reader.read)


def _upstream(place: Path, name: str, read: Callable[[Path], object], *sound: bytes) -> Reader:
    file = put(place / name, sound[0])
    return Reader(in_bytes(*sound), from_file(file, lambda: read(file)))


@READERS.reads("upstream: SOS-HL-1K")
def _sos(place: Path) -> Reader:
    return _upstream(place, "a.csv", load_sos_hl_1k, sos_table())


@READERS.reads("upstream: SocialCD-3K")
def _socialcd(place: Path) -> Reader:
    return _upstream(place, "train_data_with_header.tsv", load_socialcd_3k, cd_table(CD))


@READERS.reads("upstream: IMHI")
def _imhi(place: Path) -> Reader:
    sound = imhi_table(imhi_row("I missed the bus"), imhi_row("a\nb"))
    return _upstream(place, "dreaddit/train.csv", lambda _: load_imhi(place, ["dreaddit"]), sound)


@READERS.reads("upstream: C-IMHI")
def _c_imhi(place: Path) -> Reader:
    reader = _upstream(place, "Instruct_CD.json", lambda file: list(iter_c_imhi(file)), alpaca(GOOD))
    return Reader(either(reader.mutator, in_values(json.loads(alpaca(GOOD, GOOD)))), reader.read)


@READERS.reads("upstream: CNSocialDepress")
def _cnsd(place: Path) -> Reader:
    said = "答案：“是”。分析：帖子1“睡不着”，帖子2“累”。"
    sound = {"1": {"inpput": "帖子1：昨晚睡不着。\n帖子2：累。", "output": said}, "2": {"inpput": "好", "output": said}}
    read = from_file(place / "CNSD_dataset.json", lambda: list(iter_cnsd(place)))
    return Reader(in_values(sound), read)


@READERS.reads("conversations.jsonl")
def _conversations(place: Path) -> Reader:
    turns = [{"role": "user", "content": "I slept badly."}, {"role": "assistant", "content": "Why?"}]
    rows = {"id": "a", "messages": turns}, {"messages": [{"role": "system", "content": "x"}, *turns]}
    return Reader(in_rows(*rows), from_file(place / "c.jsonl", lambda: read_conversations(place / "c.jsonl")))


@READERS.reads("calibration.json")
def _calibration(place: Path) -> Reader:
    sound = {"suicide_risk": {"temperature": 1.5, "records": 40}, "stress": {"temperature": 0.5, "records": 20}}
    return Reader(in_values(sound), from_file(place / "calibration.json", lambda: read_scalings(place)))


@READERS.reads("a request of a client")
def _request(place: Path) -> Reader:
    tokenizer = GlmTokenizer.load(BUILTIN)
    asked = {"model": "m", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [
        {"type": "text", "text": "I slept <|user|> badly."}]}], "max_tokens": 5, "temperature": 0.5, "seed": 3,
        "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2, "stream": True, "user": "u"}  # fmt: skip

    def read(data: bytes) -> None:
        try:
            request = read_request(data)
            wanted_of(request, prompt_of(request, tokenizer), 512)
        except ApiError as error:
            if error.status != 400:
                raise
            raise InputError(error.message) from None

    return Reader(in_values(asked), read)


@READERS.reads("state.json of datasets")
def _dataset_state(place: Path) -> Reader:
    (place / "data-00000-of-00001.arrow").write_bytes(b"x")
    return Reader(in_values(STATE), from_file(place / "state.json", lambda: record_files(place)))


@READERS.reads("a cached answer of a teacher")
def _cached(place: Path) -> Reader:
    cache = AnswerCache(place)
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 0}
    cache.put(key := cache.key(asked), asked, Answer("text", "stop", "m", 10, 5))
    path = place / key[:2] / f"{key}.json"

    def read() -> None:
        if cache.get(key) is None:  # it is asked again
            raise InputError("not kept")

    return Reader(in_values(json.loads(path.read_text())), from_file(path, read))


# --- recipes, tasks, runs ---


@READERS.reads("recipe.yaml")
def _recipe(place: Path) -> Reader:
    short = RECIPE.format(run=place).encode()
    long = {"run_dir": "r", "seed": 1, "data": {"source": "jsonl", "root": "d"}, "model": {"path": "m"},
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]},
            "stages": [{"name": "a", "languages": ["en"], "train": {"steps": 2, "rows": 1}}]}  # fmt: skip
    file = place / "recipe.yaml"
    return Reader(either(in_bytes(short), in_values(long)),
                  from_file(file, lambda: _forgetting(load_recipe, file)))  # fmt: skip


@READERS.reads("build.yaml")
def _build_recipe(place: Path) -> Reader:
    sound = {"out": "b", "cache": "c", "data": {"root": "r.jsonl"}, "experts": "r.jsonl", "teacher": {
        "base_url": "http://127.0.0.1:9", "model": "m", "temperature": 0.5}}  # fmt: skip
    file = place / "build.yaml"
    return Reader(in_values(sound), from_file(file, lambda: _forgetting(load_build_recipe, file)))


@READERS.reads("tasks.yaml")
def _tasks(place: Path) -> Reader:
    texts = [tasks_text(definitions(name)).encode() for name in OWN]
    values = [{"tasks": {name: definition}} for name, definition in OWN.items()]
    return Reader(either(in_bytes(*texts), in_values(*values)),
                  from_file(place / "tasks.yaml", lambda: read_tasks(place / "tasks.yaml")))  # fmt: skip


@READERS.reads("run.json")
def _run(place: Path) -> Reader:
    (place / "recipe.yaml").write_text(RECIPE.format(run=place / "run"))
    recipe = load_recipe(place / "recipe.yaml")
    sound = {"recipe": what_it_is(recipe), "stages": {"data": {"seconds": 1, "counts": {}}}}
    recipe.run_dir.mkdir()
    return Reader(in_values(sound), from_file(recipe.run_dir / "run.json", lambda: Run(recipe)))


@READERS.reads("manifest.json of a build")
def _manifest(place: Path) -> Reader:
    (place / "a").write_text("x")
    sound = {"files": {"a": hashlib.sha256(b"x").hexdigest()}, "made": "now"}
    return Reader(in_values(sound), from_file(place / "manifest.json", lambda: check_replaceable(place)))


@READERS.reads("answers left half done")
def _partial(place: Path) -> Reader:
    row = {"id": "r1", "prompt_ids": [1, 2], "output_ids": [3]}
    head = json.dumps({"made_by": {"model": "m"}}).encode()
    lines = in_rows(row, row | {"id": "r2"})
    sound = head + b"\n" + lines.sound + b"\n"
    return Reader(Mutator(sound, lambda draw: head + b"\n" + lines.damaged(draw) + b"\n"),
                  from_file(place / "p", lambda: open_partial(place / "p", {"model": "m"}, 4)))  # fmt: skip


@READERS.reads("metrics.jsonl")
def _metrics(place: Path) -> Reader:
    lines = in_rows({"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5})

    def read() -> None:
        _continued(place / "m.jsonl", 1).close()
        if len((place / "m.jsonl").read_bytes().splitlines()) != 1:  # a row that is none was left out
            raise InputError("not two rows")

    return Reader(lines, from_file(place / "m.jsonl", read))
