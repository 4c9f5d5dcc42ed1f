"""Every form a table may have holds the same rows, and what is not one is refused in a line."""

import csv
import datetime
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mentalglm_jax.data.intake.tabular import as_text, open_tables
from mentalglm_jax.data.records import load_datasets
from mentalglm_jax.errors import InputError

COLUMNS = ["no", "post", "label"]
POSTS = [
    ("1", "I slept well, at last.", "good"), ("2", 'He said "no; never"\nand left.', "bad"),
    ("3", "今天很累，什么都不想做。", "bad"), ("4", "and then, nothing | at all", "good"),
    ("5", "考完了，去吃火锅！", "good"), ("6", "我和他吵了一架，心里很乱。", "bad"),
]  # fmt: skip


def text(delimiter: str, rows=POSTS) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows([COLUMNS, *rows])
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def workbook(path: Path, rows, title="Posts", more=()) -> Path:
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    for name in more:
        book.create_sheet(name)
    book.save(path)
    return path


def objects() -> list[dict]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in POSTS]


def made(folder: Path, form: str) -> Path:
    rows = objects()
    if form == "xlsx":
        return workbook(folder / "t.xlsx", [COLUMNS, *POSTS])
    if form == "json":
        return put(folder / "t.json", json.dumps(rows, ensure_ascii=False, indent=1))
    if form in ("jsonl", "json of lines"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return put(folder / ("t.json" if form == "json of lines" else "t.jsonl"), lines)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
        return folder / "t.parquet"
    if form == "saved by datasets":
        load_datasets().Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=2)
        return folder / "saved"
    if form == "its state.json":
        return made(folder, "saved by datasets") / "state.json"
    if form == "a folder":
        put(folder / "own" / "notes.md", "x")
        return put(folder / "own" / "t.csv", text(",")).parent
    delimiter, encoding = form.split("/")
    return put(folder / ("t.tsv" if delimiter == "\t" else "t.csv"), text(delimiter).encode(encoding, "replace"))


FORMS = {
    ",/utf-8": "UTF-8, separated by commas", ",/utf-8-sig": "UTF-8, separated by commas",
    ";/utf-8": "UTF-8, separated by semicolons", "|/utf-8": "UTF-8, separated by bars",
    "\t/utf-8": "UTF-8, separated by tabs", ",/gb18030": "GB18030, separated by commas",
    ";/gb18030": "GB18030, separated by semicolons", ",/big5": None, ",/utf-16": "UTF-16, separated by commas",
    "\t/utf-16": "UTF-16, separated by tabs", ",/utf-16-le": "UTF-16-LE, separated by commas",
    ";/utf-16-be": "UTF-16-BE, separated by semicolons", ",/utf-32": "UTF-32, separated by commas",
    "xlsx": "sheet 'Posts'", "json": None, "json of lines": None, "jsonl": None, "parquet": None,
    "saved by datasets": None, "its state.json": None, "a folder": "UTF-8, separated by commas",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_rows(tmp_path, form):
    source = made(tmp_path, form)
    if form == ",/big5":  # no simplified characters there
        source = put(source, text(",", TRADITIONAL).encode("big5"))
    tables = open_tables(source, ["post", "label"])
    found = [tuple(as_text(row[name]) for name in ("post", "label")) for table in tables
             for _, row in table.rows(["post", "label"])]  # fmt: skip
    wanted = TRADITIONAL if form == ",/big5" else POSTS
    if "/" in form or form == "a folder":  # as Excel writes CSV
        assert [(post.replace("\r\n", "\n"), label) for post, label in found] == [row[1:] for row in wanted]
    else:
        assert found == [row[1:] for row in wanted]
    if FORMS[form]:
        assert tables[0].notes == (FORMS[form],)


TRADITIONAL = [
    ("1", "今天把陽台的花都澆了一遍，心情很好。", "good"), ("2", "這週要交三個方案，吃飯都在趕。", "bad"),
    ("3", "已經五天沒出門了，什麼都不想開始。", "bad"), ("4", "考完了，和同學去吃了火鍋！", "good"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("post", "label", "encoding"),
    [
        ("나는 오늘 너무 슬프고 잠을 잘 수 없다", "우울", "cp949"),
        ("Bugün çok üzgünüm ve uyuyamıyorum, ışığı", "yüksek", "cp1254"),
    ],
    ids=["Korean", "Turkish"],
)
def test_old_text_of_another_language_is_not_taken_for_ours(tmp_path, post, label, encoding):
    content = "".join(["post;label\n", *(f"{post} {number};{label}\n" for number in range(30))])
    path = put(tmp_path / "t.csv", content.encode(encoding))
    with pytest.raises(InputError, match=r"its encoding cannot be told; .* --encoding"):
        open_tables(path, ["post", "label"])


WESTERN = {
    "English": ["I don’t know; he said “leave me alone”, and I’ve cried…", "CAFÉ LUNA – naïve, 25°C, £5 and ½ of it.",
                "Zoë measures the Ångström unit; it is 3–4 of them."],
    "French": ["L’été dernier j’ai pleuré près de ma sœur, ça n’allait pas.", "« Tu es naïf », et où est l’œuvre ?",
               "JE SUIS DÉPRIMÉ. La façade, voilà ; être seul à Noël."],
    "German": ["Er sagte „geh weg“ und ich weiß nicht, was schön ist.", "Äpfel, Österreich, MÜDE, Straße: für später."],
    "Spanish": ["Señor, ¿qué pasó? Mañana no podré más, así es mi país.", "¡Estoy harto! Mi corazón está vacío, niño."],
    "Portuguese": ["Não sei, você não está aqui: emoções e coração.", "É difícil; amanhã vou à escola. NÃO AGUENTO."],
    "Italian": ["Non so perché, è così triste. Più tardi però andrò in città, l’ho già detto."],
}  # fmt: skip
FOREIGN = {
    "cp1250": [["Nie wiem co mam robić, czuję się źle każdego dnia.", "Łzy płyną same, jestem zmęczony życiem."],
               ["Nevím, co mám dělat, cítím se špatně.", "Přátelé mě opustili a já brečím každý večer."],
               ["Az idő nem gyógyít, a nő elment, egyedül ülök.", "Fáradt vagyok, erős fájdalom."]],
    "cp1251": [["Я не знаю, что делать, мне очень плохо.", "Каждый день одно и то же."]],
    "cp932": [["もう何をすればいいのか分かりません。", "毎日つらくて眠れないです。"]],
    "euc_jp": [["もう何をすればいいのか分かりません。", "毎日つらくて眠れないです。"]],
}  # fmt: skip


def saved(folder: Path, posts, encoding: str, count: int = 12) -> Path:
    rows = [(str(number), posts[number % len(posts)], "good") for number in range(count)]
    return put(folder / "t.csv", text(",", rows).encode(encoding, "ignore"))


@pytest.mark.parametrize("language", WESTERN)
def test_old_text_of_the_west_is_read_as_windows_saved_it(tmp_path, language):
    path = saved(tmp_path, WESTERN[language], "cp1252")
    (table,) = open_tables(path, ["post", "label"])
    assert [row["post"] for _, row in table.rows(["post"])][: len(WESTERN[language])] == WESTERN[language]
    assert "CP1252" in table.notes[0] and "read as CP1252 by the look of it" in table.guessed[0]


@pytest.mark.parametrize("encoding", ["mac_roman", "cp437", "cp850"])
@pytest.mark.parametrize("language", WESTERN)
def test_old_text_of_a_mac_or_of_dos_is_not_taken_for_that_of_windows(tmp_path, language, encoding):
    with pytest.raises(InputError, match=f"its encoding cannot be told; .* --encoding .*{encoding}"):
        open_tables(saved(tmp_path, WESTERN[language], encoding))


@pytest.mark.parametrize(
    ("post", "encoding"),
    [("I don’t know", "mac_roman"), ("He said “leave me alone”", "mac_roman"), ("my café", "cp437"),
     ("naïve people", "cp437"), ("über", "cp850"), ("CAFÉ", "cp1252")],
)  # fmt: skip
def test_one_sign_may_be_too_little_to_tell_by(tmp_path, post, encoding):
    path = saved(tmp_path, [post, *["plain words are here again and again"] * 39], encoding, 40)
    with pytest.raises(InputError, match=f"its encoding cannot be told; .*{encoding}"):
        open_tables(path)


@pytest.mark.parametrize(
    "post", ["I don’t know", "my café", "naïve people", "30°", "£20", "“no”", "wait… what", "über"]
)
def test_one_sign_may_be_enough(tmp_path, post):
    path = saved(tmp_path, [post, *["plain words are here again and again"] * 39], "cp1252", 40)
    assert next(row["post"] for _, row in open_tables(path)[0].rows(["post"])) == post


@pytest.mark.parametrize(("encoding", "posts"), [(name, posts) for name, given in FOREIGN.items() for posts in given])
def test_old_text_of_the_east_is_not_taken_for_ours(tmp_path, encoding, posts):
    hint = encoding if encoding != "cp1251" else "gb18030, big5hkscs"
    with pytest.raises(InputError, match=f"its encoding cannot be told; .* --encoding .*{hint}"):
        open_tables(saved(tmp_path, posts, encoding))


@pytest.mark.parametrize(
    ("encoding", "posts"),
    [("cp950", ["這週要交三個方案，吃飯都在趕，心裏很煩。", "那裏沒有人認識我，恒久的化粧，下圍碁。"]),
     ("big5hkscs", ["今日好唔開心，成日喊。", "佢哋成日話我諗得太多。", "尋晚瞓唔著，諗咗好多嘢。"])],
)  # fmt: skip
def test_characters_that_windows_and_hong_kong_added_to_big5(tmp_path, encoding, posts):
    path = saved(tmp_path, posts, encoding)
    (table,) = open_tables(path)
    assert table.notes == (f"{encoding.upper()}, separated by commas",)
    assert {row["post"] for _, row in table.rows(["post"])} == {*posts}
    put(path, path.read_bytes() + b"13,\xff\xff,good\r\n")
    with pytest.raises(InputError, match=r"--encoding big5hkscs$"):
        open_tables(path)


def test_what_is_guessed_is_told_from_what_the_file_says(tmp_path):
    book = workbook(tmp_path / "t.xlsx", [COLUMNS, *POSTS], more=["Other"])
    assert open_tables(book)[0].guessed == ("sheet 'Posts' of 2 is read, the first",)
    assert open_tables(book, sheet="Posts")[0].guessed == ()
    path = saved(tmp_path, WESTERN["German"], "cp1252")
    assert open_tables(path, encoding="cp1252")[0].guessed == ()
    assert open_tables(put(path, text(",")))[0].guessed == ()


def test_the_separator_is_the_one_that_makes_the_columns_asked_for(tmp_path):
    """Not the one that stands most often in the header."""
    path = put(tmp_path / "t.csv", "post;label;notes, of, any, kind\na, b;x;c\n")
    (table,) = open_tables(path, ["post", "label"])
    assert table.columns == ("post", "label", "notes, of, any, kind")
    assert list(table.rows(["post", "label"])) == [(2, {"post": "a, b", "label": "x"})]
    assert open_tables(path)[0].columns[0] == "post;label;notes"


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|"])
def test_excel_s_line_says_the_separator(tmp_path, delimiter, form):
    put(tmp_path / "t.csv", f"sep={delimiter}\r\n{text(delimiter)}".encode(form))
    (table,) = open_tables(tmp_path / "t.csv", ["post", "label"])
    assert table.columns == tuple(COLUMNS)
    found = list(table.rows(["post", "label"]))
    assert [(row["post"], row["label"]) for _, row in found] == [(post, label) for _, post, label in POSTS]
    assert found[0][0] == 3  # as an editor counts


def test_rows_are_counted_as_the_file_counts_them(tmp_path):
    """In a text by lines, quoted line ends and blank lines included; in a sheet by its rows, empty ones included."""
    path = put(tmp_path / "t.csv", 'post,label\n\n"a\nb",x\n\n\nc,y\n')
    (table,) = open_tables(path)
    assert [number for number, _ in table.rows(["post"])] == [3, 7]
    book = openpyxl.Workbook()
    for place, value in {"B3": "post", "C3": "label", "B5": "a", "C5": "x", "B9": "c"}.items():
        book.active[place] = value
    book.save(tmp_path / "t.xlsx")
    (table,) = open_tables(tmp_path / "t.xlsx")
    assert table.columns == ("", "post", "label")
    assert list(table.rows(["post", "label"])) == [(5, {"post": "a", "label": "x"}), (9, {"post": "c", "label": None})]


def test_values_of_a_workbook_are_text_as_people_write_it(tmp_path):
    when = datetime.datetime(2026, 11, 29, 7, 5)
    rows = [["post", "label"], ["whole", 3], ["part", 2.5], ["when", when], ["day", datetime.datetime(2026, 1, 2)],
            ["yes", True], ["formula", "=1+1"], ["none", None]]  # fmt: skip
    (table,) = open_tables(workbook(tmp_path / "t.xlsx", rows))
    assert [as_text(row["label"]) for _, row in table.rows(["label"])] == [
        "3", "2.5", "2026-11-29 07:05:00", "2026-01-02", "true", "", ""
    ]  # fmt: skip


def test_the_sheet_that_is_named_is_read(tmp_path):
    path = workbook(tmp_path / "t.xlsx", [["post"], ["a"]], more=["Other"])
    assert open_tables(path)[0].notes == ("sheet 'Posts' of 2",)
    with pytest.raises(
        InputError, match=r"t.xlsx: no sheet 'Othr' \(did you mean 'Other'\?\); there are: Posts, Other"
    ):
        open_tables(path, sheet="Othr")


def test_names_that_stand_for_numbers_are_read_with_them(tmp_path):
    datasets = load_datasets()
    features = datasets.Features({"post": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_list([{"post": "a", "label": 1}], features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "t.parquet")
    for place in ("saved", "t.parquet"):
        (table,) = open_tables(tmp_path / place)
        assert dict(table.classes) == {"label": ("no", "yes")}


def test_a_table_per_split(tmp_path):
    for name in ("train", "validation", "test"):
        put(tmp_path / f"{name}.csv", f"post,label\n{name},x\n")
    tables = open_tables(tmp_path)
    assert [table.split for table in tables] == ["train", "dev", "test"]
    assert [row["post"] for table in tables for _, row in table.rows(["post"])] == ["train", "validation", "test"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.xls", b"\xd0\xcf\x11\xe0", r"a.xls: is an old Excel workbook, no table; save it as one of .csv, .tsv"),
        ("a.pdf", b"%PDF", "a.pdf: is a PDF document, no table"),
        ("a.zip", b"PK", "a.zip: is an archive, no table"),
        ("a.unknown", b"x", "a.unknown: is none of the tables that can be read; save it as"),
        ("a.xlsx", b"no zip", r"a.xlsx: not an Excel workbook that can be read \(File is not a zip file\)"),
        ("a.parquet", b"PAR1", "a.parquet: not a Parquet file that can be read"),
        ("a.csv", b"post,label\nI,a\n\xff\x81,b\n", "its encoding cannot be told; save it as UTF-8, or name it"),
        ("a.csv", b"post,label\nI,a\n\xff\xfe\x00\x81,b\n" + bytes(range(128, 160)), "its encoding cannot be told"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(tmp_path, name, data, says):
    with pytest.raises(InputError, match=says):
        open_tables(put(tmp_path / name, data))[0].rows([])


def test_a_wrong_column_names_the_nearest_and_lists_all(tmp_path):
    path = put(tmp_path / "t.csv", text(";"))
    with pytest.raises(
        InputError, match=r"t.csv: no column 'pots' \(did you mean 'post'\?\); there are: no, post, label"
    ):
        open_tables(path, ["pots"])[0].rows(["pots"])
    put(path, "post,post\na,b\n")
    with pytest.raises(InputError, match="column 'post' stands there twice; rename one"):
        open_tables(path)[0].rows(["post"])


def test_what_is_not_there_is_said_without_asking_anybody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    put(tmp_path / "two" / "a.csv", "x\n")
    put(tmp_path / "two" / "b.xlsx", "x\n")
    found = {"nowhere.csv": "nowhere.csv: no such file or folder", "./x/y/z": "no such file or folder",
             "empty": "empty: holds no table", "two": r"two: holds 2 tables \(a.csv, b.xlsx\)"}  # fmt: skip
    for source, says in found.items():
        with pytest.raises(InputError, match=says):
            open_tables(source)


def test_a_data_set_of_the_hub_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^nobody/nothing: no such file or folder, and as a data set of the Hub it"):
        open_tables("nobody/nothing")


def test_a_data_set_of_the_hub_is_read_without_decoding_its_pictures(tmp_path, monkeypatch):
    """Only the way to the Hub is not walked (test_hub.py does): the files are real, and written by `datasets`."""
    monkeypatch.chdir(tmp_path)
    datasets = load_datasets()
    features = datasets.Features({"post": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"]),
                                  "picture": datasets.Image()})  # fmt: skip
    rows = [{"post": f"post {n}", "label": n % 2, "picture": {"bytes": b"no picture", "path": None}} for n in range(3)]
    part = datasets.Dataset.from_list(rows, features=features)
    asked, files = [], {}
    for split in ("train", "validation", "unsupervised"):
        part.to_parquet(tmp_path / f"{split}.parquet")
        files[split] = [f"hf://datasets/somebody/posts@main/{split}.parquet"]

    def load(name, config):
        asked.append((name, config))
        return SimpleNamespace(config=SimpleNamespace(data_files=files), info=SimpleNamespace(features=features))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, place, **where: str(tmp_path / place))
    tables = open_tables("somebody/posts", config="plain")
    assert asked == [("somebody/posts", "plain")]
    assert [(table.name, table.split) for table in tables] == [
        ("somebody/posts (train)", "train"), ("somebody/posts (validation)", "dev")
    ]  # fmt: skip
    assert tables[0].notes == ("split unsupervised is left out",) and tables[0].classes == {"label": ("no", "yes")}
    assert list(tables[0].rows(["label", "post"]))[1] == (2, {"label": 1, "post": "post 1"})


def test_a_value_that_is_not_there_is_none(tmp_path):
    pq.write_table(pa.table({"post": ["a", None], "label": [None, "x"]}), tmp_path / "t.parquet")
    put(tmp_path / "t.jsonl", '{"post": "a"}\n{"label": "x"}\n')
    for name in ("t.parquet", "t.jsonl"):
        (table,) = open_tables(tmp_path / name)
        assert [row for _, row in table.rows(["post", "label"])] == [
            {"post": "a", "label": None}, {"post": None, "label": "x"}
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["Test.csv", "test.CSV", "TEST.Csv"])
def test_a_split_s_table_is_found_in_any_case(tmp_path, name):
    put(tmp_path / "train.csv", "post,label\na,x\n")
    put(tmp_path / name, "post,label\nb,y\n")
    assert [table.split for table in open_tables(tmp_path, ["post"])] == ["train", "test"]


def test_tables_that_are_left_aside_are_named(tmp_path):
    for name in ("train.csv", "test.csv", "test.tsv", "readers.csv", "dataset_info.json"):
        put(tmp_path / name, "post,label\na,x\n")
    notes = open_tables(tmp_path, ["post"])[0].notes
    assert notes == ("UTF-8, separated by commas", "not read, for they are of no split: readers.csv")
    put(tmp_path / "train_1.csv", "post,label\nb,y\n")
    with pytest.raises(InputError, match=r"train_1\.csv begins as a split's name"):
        open_tables(tmp_path, ["post"])


ESCAPES = {"so_x000D_\nlate": "so\r\nlate", "a _x005F_x000D_ b": "a _x000D_ b", "_x0041_": "A", "_xD83D_": "_xD83D_",
           "_x0000_": "_x0000_", "a_x1_": "a_x1_", "_x000D": "_x000D"}  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_characters_that_excel_escaped_come_back(tmp_path, shared):
    path = workbook(tmp_path / "t.xlsx", [("post",), *((text,) for text in ESCAPES)])
    if not shared:  # inline strings, as others write
        cells = "".join(f'<row r="{number}"><c r="A{number}" t="inlineStr"><is><t>{text}</t></is></c></row>'
                        for number, text in enumerate(("post", *ESCAPES), start=1))  # fmt: skip
        sheet = f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{cells}'
        out = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                own = f"{sheet}</sheetData></worksheet>" if name.endswith("sheet1.xml") else old.read(name)
                new.writestr(name, own)
        path.write_bytes(out.getvalue())
    found = [row["post"] for _, row in open_tables(path)[0].rows(["post"])]
    assert [one.replace("\r\n", "\n") for one in found] == [one.replace("\r\n", "\n") for one in ESCAPES.values()]
