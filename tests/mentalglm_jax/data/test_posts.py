"""Posts without labels: every kind of file, what a row may say, what is wrong with it."""

import json

import pytest

from mentalglm_jax.data.posts import read_posts
from mentalglm_jax.data.records import Post, Record, write_records
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.inputs import read_labelled
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.own_tasks import definitions

RISK = tasks.TASKS["suicide_risk"]


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lay(path, kind):
    """The same two posts in a file of each kind."""
    file = path / f"mine.{kind}"
    posts = ["I like rain.", "我喜欢下雨。"]
    if kind == "txt":
        file.write_text("\ufeffI like rain.\n\n  我喜欢下雨。  \r\n", encoding="utf-8")
    elif kind in ("csv", "tsv"):
        apart = "," if kind == "csv" else "\t"
        file.write_text(f"n{apart}text\n1{apart}I like rain.\n2{apart}我喜欢下雨。\n", encoding="utf-8")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"text": post, "label": 3}) + "\n" for post in posts))
    else:
        parquet(file, [{"post": post, "score": 0.5} for post in posts])
    return file


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_needs_a_post_and_nothing_else(tmp_path, kind):
    found = read_posts(lay(tmp_path, kind), task="suicide_risk", language="zh")
    asked = RISK.question("zh")
    assert found == [Post("mine-00001", "suicide_risk", "zh", "I like rain.", asked),
                     Post("mine-00002", "suicide_risk", "zh", "我喜欢下雨。", asked)]  # fmt: skip
    assert read_posts(lay(tmp_path, kind), task="suicide_risk", language="en", limit=1)[0].language == "en"


def test_a_row_says_its_language_id_and_question(tmp_path):
    (tmp_path / "p.csv").write_text("id,language,question,body\n7,zh,,下雨\n,en,Is it low?,rain\n")
    found = read_posts(tmp_path / "p.csv", task="suicide_risk", column="body")
    assert [(post.id, post.language, post.question) for post in found] == [
        ("7", "zh", RISK.question("zh")), ("p-00002", "en", "Is it low?")]  # fmt: skip


def test_a_bilingual_table_is_asked_in_the_language_of_each_post(tmp_path):
    (tmp_path / "p.csv").write_bytes("no;text\n1;睡不着，很累\n2;I slept well.\n".encode("gb18030"))
    with pytest.warns(UserWarning, match="read as GB18030"):
        found = read_posts(tmp_path / "p.csv", task="suicide_risk")
    assert [(post.language, post.question) for post in found] == [
        (language, tasks.get_task("suicide_risk").question(language)) for language in ("zh", "en")
    ]


def test_the_language_of_a_task_that_has_one(tmp_path):
    (tmp_path / "p.txt").write_text("rain\n")
    assert read_posts(tmp_path / "p.txt", task="imhi_dr")[0].language == "en"


def test_records_keep_their_gold_label_unless_something_else_is_asked(tmp_path):
    record = Record("r", "suicide_risk", "en", "rain", "Is it high or low?", "low", explanation="It says rain.")
    write_records(tmp_path / "r.jsonl", [record])
    assert read_posts(tmp_path / "r.jsonl") == [record]
    assert read_posts(tmp_path / "r.jsonl", task="suicide_risk") == [record]
    other = read_posts(tmp_path / "r.jsonl", task="imhi_dr")
    assert other == [Post("r", "imhi_dr", "en", "rain", tasks.TASKS["imhi_dr"].question("en"))]


def test_tasks_beside_the_file_and_in_the_row(tmp_path):
    (weather,) = definitions("weather")
    tasks.write_tasks(tmp_path / "tasks.yaml", [weather])
    (tmp_path / "p.txt").write_text("rain\n")
    assert read_posts(tmp_path / "p.txt", task="weather", language="en")[0].task == "weather"
    with pytest.raises(InputError, match=r"with --task \(here: weather\)"):
        read_posts(tmp_path / "p.txt", language="en")
    tasks.forget_added()
    (tmp_path / "tasks.yaml").unlink()
    row = {"post": "rain", "task": "weather", "language": "en", "task_definition": tasks.task_record(weather)}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read_posts(tmp_path / "p.jsonl")[0].question == weather.question("en")


BAD = [
    ("p.txt", "123\n", {"task": "suicide_risk"}, "p.txt:1: the language of the post cannot be told; say in"),
    ("p.txt", "今日はとても疲れた\n", {"task": "suicide_risk"}, "the language of the post is ja, it seems; say in"),
    ("p.txt", "rain\n", {"language": "en"}, "p.txt:1: says no task; say what the posts are asked with --task"),
    ("p.txt", "rain\n", {"task": "suicide_rsk", "language": "en"}, "did you mean 'suicide_risk'"),
    ("p.txt", "rain\n", {"task": "imhi_dr", "language": "zh"}, "p.txt:1: task imhi_dr: no language 'zh'"),
    ("p.txt", "rain\n", {"task": "imhi_dr", "column": "post"}, "has no columns"),
    ("p.txt", "\n \n", {"task": "imhi_dr"}, "p.txt: holds no post"),
    ("p.csv", "a,b\n1,2\n", {"task": "imhi_dr"}, "p.csv:2: has no 'post' or 'text'; there is a, b; name the post's"),
    ("p.csv", "post\n\" \"\n", {"task": "imhi_dr"}, "holds no post"),
    ("p.csv", "n,post\n1,\n", {"task": "imhi_dr"}, "p.csv:2: post: the post is empty"),
    ("p.csv", "post,post\n1,2\n", {"task": "imhi_dr"}, "column 'post' stands there twice"),
    ("p.csv", "post\n1,2\n", {"task": "imhi_dr"}, "p.csv:2: 2 cells, the header has 1"),
    ("p.csv", "id,post\na,x\na,y\n", {"task": "imhi_dr"}, "p.csv:3: id 'a' already stands in row 2"),
    ("p.csv", "post,language\nx,English\n", {"task": "imhi_dr"}, "p.csv:2: task imhi_dr: no language 'English'"),
    ("p.jsonl", "3\n", {"task": "imhi_dr"}, "p.jsonl:1: expected a JSON object"),
    ("p.jsonl", '{"post": 3}\n', {"task": "imhi_dr"}, "p.jsonl:1: post: expected text, got int"),
    ("p.jsonl", '{"post": "x", "language": ["en"]}\n', {"task": "imhi_dr"}, "language: expected text, got list"),
    ("p.jsonl", '{"post": "x\\ud83d"}\n', {"task": "imhi_dr"}, "half of a UTF-16 surrogate pair"),
    ("p.docx", "x", {"task": "imhi_dr"}, "p.docx: not a kind of file that posts come in; known: .txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "options", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_is_wrong_is_named_by_file_and_row(tmp_path, name, text, options, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_posts(tmp_path / name, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_directory_and_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="is a directory; give one file of posts"):
        read_posts(tmp_path, task="imhi_dr")
    with pytest.raises(InputError, match="no such file"):
        read_posts(tmp_path / "p.txt", task="imhi_dr")


def test_lines_of_an_old_mac_are_posts_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"I like rain.\r\rIt snows.\r")
    found = read_posts(tmp_path / "a.txt", task="suicide_risk")
    assert [post.post for post in found] == ["I like rain.", "It snows."]
    assert len({post.id for post in found}) == 2


@pytest.mark.parametrize("cell", ["#N/A", "#REF!", " #DIV/0! "])
def test_an_error_of_a_spreadsheet_is_no_post(tmp_path, cell):
    (tmp_path / "a.csv").write_text(f"post\nI like rain.\n{cell}\n")
    with pytest.raises(InputError, match=r"a\.csv:3: post: the post is empty"):
        read_posts(tmp_path / "a.csv", task="suicide_risk")


def test_a_guess_at_how_a_table_was_saved_is_said(tmp_path, recwarn):
    path = tmp_path / "mine.csv"
    path.write_text("text,n\nI don’t know.,1\n", encoding="cp1252")
    with pytest.warns(UserWarning, match=r"mine\.csv: not UTF-8, read as CP1252 by the look of it"):
        assert read_posts(path, task=RISK.name, language="en")[0].post == "I don’t know."
    path.write_text("text,n\nI don’t know.,1\n", encoding="utf-8")
    recwarn.clear()
    assert read_posts(path, task=RISK.name, language="en") and not recwarn


def test_evaluation_says_a_guess_too(tmp_path):
    path = tmp_path / "labelled.csv"
    path.write_text("post,label\nI don’t know.,high\n", encoding="cp1252")
    with pytest.warns(UserWarning, match=r"labelled\.csv: not UTF-8, read as CP1252 by the look of it"):
        assert read_labelled(path, RISK.name, "en")[0].post == "I don’t know."
