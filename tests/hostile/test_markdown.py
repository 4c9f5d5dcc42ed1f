"""Names and questions from strangers in what others read as Markdown: model cards, datasheets, leaderboards. As
CommonMark with GitHub's extensions has it, no tag, link, picture, heading, list or block comes of them, and every
letter stays."""

import pytest
from markdown_it import MarkdownIt

from mentalglm_jax.checkpoints.model_card import adapter_card
from mentalglm_jax.data.intake.output import datasheet as import_datasheet
from mentalglm_jax.evaluate.leaderboard import leaderboard_markdown
from mentalglm_jax.evaluate.report import model_card
from mentalglm_jax.markdown import code, escaped, fenced
from mentalglm_jax.model.lora import LoraConfig
from mentalglm_jax.pipeline.card import run_card
from mentalglm_jax.text import tasks
from mentalglm_jax.text.task_files import tasks_of
from tests.mentalglm_jax.pipeline.test_card import make

READ = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
ATTACKS = {
    "a tag": "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "a closing tag": "</p></code></pre><svg/onload=alert(1)>",
    "a picture": "![x](https://example.org/seen.png)",
    "a link": "[click](javascript:alert(1)) [ref] [x]: https://example.org",
    "an address": "https://example.org/login www.example.org <https://example.org>",
    "marks": "**bold** _em_ ~~gone~~ `code` \\",
    "backticks": "` `` ``` ```` x` ``",
    "a table's end": "a | b |\n|---|---|\n| c",
    "a block": "```\n</div>\n```\n# Heading\n* item\n> quote\n    code\n---\n",
    "an entity": "&lt;script&gt; &#60;b&#62; &nbsp;",
    "a comment": "<!-- x --> <![CDATA[ x ]]> <?php x ?>",
    "marks of direction": "\u202eevil\u2066 \x1b[31m\x00",
}  # fmt: skip
PLAIN_TOKENS = {"inline", "text", "softbreak", "paragraph_open", "paragraph_close", "code_inline", "table_open",
                "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close", "tr_open", "tr_close",
                "th_open", "th_close", "td_open", "td_close"}  # fmt: skip


def tokens(text):
    for token in READ.parse(text):
        yield token
        yield from token.children or ()


def kinds(text):
    return [token.type for token in tokens(text)]


def without_text(text):
    """The marks of a page: what it has but for the words."""
    return [kind for kind in kinds(text) if kind != "text"]


def said(text):
    return "".join(token.content for token in tokens(text) if token.type in ("text", "code_inline", "fence"))


def letters(attack):
    return " ".join("".join(one if one.isprintable() else " " for one in attack).split())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", [escaped, code], ids=["escaped", "code"])
def test_a_text_is_shown_as_it_is(form, attack):
    shown = form(ATTACKS[attack])
    assert set(kinds(f"says {shown} here")) <= PLAIN_TOKENS and "\n" not in shown
    assert said(f"says {shown} here") == f"says {letters(ATTACKS[attack])} here"
    assert form is code or "://" not in shown


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_cell_of_a_table(attack):
    text = f"| a | b |\n|---|---|\n| {escaped(ATTACKS[attack])} | x |"
    assert set(kinds(text)) <= PLAIN_TOKENS and kinds(text).count("td_open") == 2
    assert said(text) == f"ab{letters(ATTACKS[attack])}x"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_block(attack):
    found = list(tokens(f"before\n\n{fenced(ATTACKS[attack], 'more')}\n\nafter"))
    (block,) = [token for token in found if token.type == "fence"]
    assert block.content.replace("\ufffd", "\0") == f"{ATTACKS[attack]}\nmore\n" and found[-2].content == "after"


def own_task(attack):
    """A task whose every word is an attack; what a task file cannot say is left out."""
    line, key = letters(attack), "".join(one for one in letters(attack) if one not in ",;#\t")[:60].strip()
    raw = {"kind": "single", "question": {"en": line}, "sentence": {"en": "It is {}."}, "description": line,
           "system": {"en": line}, "labels": {key: {"name": {"en": line}}, "b": {"name": {"en": "plain"}}},
           "prompt": {"en": f"{{post}} {line.replace('{', '').replace('}', '')}"}}  # fmt: skip
    (task,) = tasks_of({"mood": raw}, "tasks.yaml")
    return task


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_model_card_shows_a_strangers_task(tmp_path, attack):
    tasks.add_tasks([own_task(ATTACKS[attack])], "tasks.yaml")
    job = make(tmp_path / "run")
    key = tasks.get_task("mood").keys[0]
    job.result["data"] |= {"counts": {"mood": {"train": 3}}, "labels": {"mood": {key: 3}}, "languages": {"en": 3}}
    body = run_card(job, "peft").split("---\n", 2)[2]
    usual = run_card(make(tmp_path / "other"), "peft").split("---\n", 2)[2]
    assert set(kinds(body)) <= {*PLAIN_TOKENS, *kinds(usual)}
    assert [kinds(body).count(kind) for kind in ("fence", "link_open", "html_inline", "heading_open")] == [
        kinds(usual).count(kind) for kind in ("fence", "link_open", "html_inline", "heading_open")]  # fmt: skip
    assert letters(ATTACKS[attack]) in said(body)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_adapters_card_shows_a_strangers_expression(attack):
    config = LoraConfig(rank=2, alpha=4.0, target_modules="q_proj")
    object.__setattr__(config, "target_modules", ATTACKS[attack])
    body = adapter_card(config, None).split("---\n", 2)[2]
    assert set(kinds(body)) <= {*PLAIN_TOKENS, "heading_open", "heading_close"}
    assert letters(ATTACKS[attack]) in said(body)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_datasheet_shows_a_strangers_labels(attack):
    def sheet(text):
        made = {"task": "mood", "splits": {"train": {"records": 1, "labels": {text: 1}}}, "languages": {"en": 1},
                "explanations": 0, "source": {"name": text}, "rows": 1, "notes": [text], "files": {}}  # fmt: skip
        return import_datasheet(made).split("---\n", 2)[2]

    assert without_text(sheet(ATTACKS[attack])) == without_text(sheet("plain"))
    assert said(sheet(ATTACKS[attack])).count(letters(ATTACKS[attack])) == 3


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_leaderboard_shows_a_directorys_name(attack):
    row = {"task": "mood", "system": ATTACKS[attack], "kind": "run", "reading": "text", "n": 1, "weighted_f1": 0.5,
           "micro_f1": 0.5, "macro_f1": 0.5, "ci95": [0, 1], "sd": None, "against_best": None}  # fmt: skip
    text = leaderboard_markdown([row, row | {"kind": "floor"}])
    assert set(kinds(text)) <= PLAIN_TOKENS and kinds(text).count("td_open") == 16
    assert said(text).count(letters(ATTACKS[attack])) == 2


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_evaluations_card_shows_its_title_and_notes(attack):
    text = model_card({}, title=ATTACKS[attack], notes=[ATTACKS[attack]])
    assert without_text(text) == without_text(model_card({}, title="title", notes=["note"]))
    assert said(text).count(letters(ATTACKS[attack])) == 2
