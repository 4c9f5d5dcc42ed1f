"""Small files of strangers that stand for gigabytes, and runs that were made up: refused in a line before memory is
taken."""

from __future__ import annotations

import contextlib
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from probes.cli import _finished
from probes.errors import ProbeError, ProbeInputError
from probes.foreign import parse_json
from probes.intake import template
from probes.models.load import load_model
from probes.models.verify import read_reference
from probes.records import Report
from probes.report.display import html
from probes.report.page import render
from probes.report.view import _bars, groups
from probes.results.cache import MOST_BYTES, Cache, digest
from probes.results.posts import MOST_CHARACTERS, MOST_UNITS, PostResult
from probes.results.store import SCHEMA_VERSION, Run
from probes.results.summary import summarise
from probes.saliency.settings import METHODS
from tests.hostile.attack import refused, run
from tests.hostile.fuzzing import in_values
from tests.hostile.probes_files import edit
from tests.probes.worlds import attribution, post_result


@contextlib.contextmanager
def held_at_most(mib: int) -> Iterator[None]:
    """Of what Python and numpy allocate meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib << 20
    finally:
        tracemalloc.stop()


# --- templates, archives, models ---


def test_texts_of_a_template_that_fill_the_memory_of_who_started_it():
    """Each is within its bound, and so is the process that renders; together they are not."""
    with pytest.raises(ProbeInputError, match=r"t\.jinja: cannot be rendered \(\d of 50 texts take more than 32 MiB"):
        template.render("{{ '\u00e9' * 4000000 }}", [{}] * 50, "t.jinja")


def test_many_long_prompts_are_rendered():
    """A data set may be large: its own texts and a long instruction for each do not count as growth."""
    posts = [{"post": f"{number} " + "我很难过。" * 400} for number in range(500)]
    found = template.render("x" * 2000 + "{{ post }}", posts, "t.jinja")
    assert all(str(text).endswith(row["post"]) for text, row in zip(found, posts, strict=True))


def _reference(**changes: Any) -> dict[str, np.ndarray]:
    ones = np.ones((2, 3), np.int32)
    lengths = np.array([3, 3], np.int32)
    return {"tokens": ones, "lengths": lengths, "logits": np.zeros((2, 3, 40), np.float32), "prompt_ids": ones,
            "prompt_lengths": lengths, "greedy_ids": ones, "eos_ids": np.ones(1, np.int32)} | changes  # fmt: skip


def test_an_archive_of_zeros(tmp_path):
    """96 kB that are 96 MiB; without a bound they could be 56 GiB."""
    np.savez_compressed(tmp_path / "r.npz", **_reference(logits=np.zeros((2, 3, 1 << 22), np.float32)))
    with (
        held_at_most(8),
        pytest.raises(ProbeInputError, match=r"array logits .* is far larger than the file"),
    ):
        read_reference(tmp_path / "r.npz")


def test_many_arrays_that_are_each_within_the_bound(tmp_path):
    """Counted together."""
    part = np.zeros((2, 1 << 20), np.int32)
    np.savez_compressed(tmp_path / "r.npz", **_reference(tokens=part, prompt_ids=part, greedy_ids=part))
    with pytest.raises(ProbeInputError, match=r"array greedy_ids .* is far larger than the file"):
        read_reference(tmp_path / "r.npz")


def test_a_file_that_was_packed_is_read(tmp_path):
    np.savez_compressed(tmp_path / "r.npz", **_reference())
    assert read_reference(tmp_path / "r.npz")["logits"].shape == (2, 3, 40)


SMALL = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}
TABLES = {
    "gptj": (SMALL | {"rotary_dim": 4}, {"n_positions": 60_000_000}),
    "codegen": (SMALL | {"n_head": 4, "rotary_dim": 2, "n_ctx": 32}, {"n_positions": 120_000_000}),
    "ctrl": (SMALL | {"dff": 16}, {"n_positions": 20_000_000}),
    "xglm": ({"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "vocab_size": 64},
             {"max_position_embeddings": 20_000_000}),
    "gpt_neo": ({"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
                 "vocab_size": 64, "max_position_embeddings": 32}, {"max_position_embeddings": 40_000}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_no_file_holds(kind, tmp_path):
    """Positions and masks are computed when a model is made, as many as config.json says."""
    sizes, changes = TABLES[kind]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if kind == "gpt_neo":  # a table of weights, too, which the file would have
        edit(tmp_path / "config.json", max_position_embeddings=32)
    load_model(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ProbeInputError, match=r"config\.json: describes a model with [\d,]+ MiB of position tables"):
        load_model(tmp_path)


# --- runs that were made up ---

POST = json.loads(json.dumps(post_result(0).to_dict()))


def _summary(post: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(summarise([PostResult.from_dict(post)], n_boot=20)))


SUMMARY = _summary(POST)
NAME = f"{'0' * 32}.json"
MANIFEST = {
    "kind": "probes", "schema_version": SCHEMA_VERSION, "status": "done", "cache": [NAME], "model": "m", "rows": 1,
    "skipped": [{"id": "a", "reason": "b"}], "redact": False, "methods": ["ig"], "settings": {"a": 1},
    "versions": {"x": "1"}, "limit": None, "summary": digest(SUMMARY),
}  # fmt: skip
HIDDEN = {"post": None, "explanation": None, "label_text": None}
BARE = HIDDEN | {"attributions": [], "citations": [], "measured": [], "not_varied": []}


def _run(place: Path, post: dict[str, Any], summary: Any = SUMMARY) -> Path:
    """A directory whose digests are right."""
    (place / "cache").mkdir(parents=True)
    (place / "cache" / NAME).write_text(json.dumps({"digest": digest(post, name=NAME), "value": post}))
    (place / "summary.json").write_text(json.dumps(summary))
    (place / "manifest.json").write_text(json.dumps(MANIFEST | {"summary": digest(summary)}))
    return place


def _cited(times: int) -> list[dict[str, Any]]:
    return [{**POST["citations"][0], "id": f"c{n}", "post_char": [[0, POST["length"]]]} for n in range(times)]


MADE_UP = {
    "a post of 10^9 characters": (BARE | {"length": 10**9, "units": [[0, 10**9]]}, "a length does not fit"),
    "an explanation of 10^12 characters": (HIDDEN | {"explanation_length": 10**12}, "a length does not fit"),
    "one character too many": (HIDDEN | {"explanation_length": MOST_CHARACTERS + 1}, "a length does not fit"),
    "an explanation without its post": (HIDDEN | {"explanation": POST["explanation"]}, "without its post"),
    "a clause for each character": (
        BARE | {"length": MOST_UNITS + 1, "units": [[at, at + 1] for at in range(MOST_UNITS + 1)]},
        "number of clauses",
    ),
    "the post cited five hundred times": ({"citations": _cited(500)}, "what is cited does not fit"),
    "a map of no method": ({"attributions": [POST["attributions"][0] | {"method": "x"}]}, "list of maps does not fit"),
    "a map twice": ({"attributions": POST["attributions"][:1] * 2}, "the list of maps does not fit"),
    "a chain of many steps": ({"chain": [[0.5, 0.0]] * 1001}, "the number of steps does not fit"),
    "many clauses put in": ({"counterfactuals": [[0.5, 0.0]] * 1001}, "the number of steps does not fit"),
    **{f"{name} marked ten thousand times": ({name: [[0, 1]] * 10_001}, "the number of spans does not fit")
       for name in ("cues", "decoys", "rationales")},
}  # fmt: skip


@pytest.mark.parametrize("command", ["report", "check"])
@pytest.mark.parametrize("attack", MADE_UP)
def test_a_post_that_was_made_up(attack, command, tmp_path, capsys):
    changes, says = MADE_UP[attack]
    refused(run(["probes", command, _run(tmp_path / "run", POST | changes)], capsys), says, seconds=600)


def test_the_run_they_were_made_of_is_shown(tmp_path, capsys):
    for number, changes in enumerate(({}, HIDDEN, {"citations": _cited(50)})):
        place = _run(tmp_path / str(number), POST | changes, _summary(POST | changes))
        assert run(["probes", "report", place], capsys).code == 0


def test_a_made_up_post_of_many_clauses_is_examined_in_time():
    """Every other clause cited and marked, every method: it took a minute, and a run may have any number of them."""
    size = MOST_UNITS
    post = POST | HIDDEN | {
        "length": size, "units": [[at, at + 1] for at in range(size)], "cues": None, "measured": [], "not_varied": [],
        "rationales": [[at, at + 1] for at in range(1, size, 2)], "chain": [], "counterfactuals": [],
        "citations": [POST["citations"][0] | {"id": f"c{at}", "post_char": [[at, at + 1]]} for at in range(0, size, 2)],
    }  # fmt: skip
    rng = np.random.default_rng(0)
    maps = [
        attribution(name, "label", rng.standard_normal(size), [(0, size)], example_id=POST["id"]) for name in METHODS
    ]
    result = PostResult.from_dict(post | {"attributions": [one.to_dict() for one in maps]})
    began = time.process_time()
    assert len(result.evidence().report.checks) > 100
    assert time.process_time() - began < 25


@pytest.mark.parametrize("part", ["manifest", "summary"])
def test_whatever_a_page_cannot_show_is_one_line(part, tmp_path, capsys):
    """The digests of somebody else's run are right; what is in it may be anything."""
    made, result = in_values({"manifest": MANIFEST, "summary": SUMMARY}[part]), post_result(0)
    said: list[str] = []
    for number in range(40):
        data = made.damaged(random.Random(number))
        try:
            value = parse_json(data, "it", half_pairs=True)
        except ProbeInputError:
            continue
        try:
            with _finished(tmp_path):
                both = {"manifest": MANIFEST, "summary": SUMMARY} | {part: value}
                render(Run(both["manifest"], both["summary"], (result,)))
        except ProbeError as error:
            said.append(str(error))
    assert sum("holds no run as this version writes it" in one for one in said) > 3
    assert not [one for one in said if "\n" in one]
    without = {key: value for key, value in SUMMARY.items() if key != "mass_ratio_ci"}
    refused(run(["probes", "report", _run(tmp_path / "run", POST, without)], capsys), "holds no run as this version")


def test_bars_of_a_post_of_a_thousand_clauses():
    """What each is compared with is as long as the post, and kept for one at a time."""
    size, count = 20_000, 1000
    units = [(at, at + size // count) for at in range(0, size, size // count)]
    a = attribution("ig", "label", np.random.default_rng(0).standard_normal(size))
    with held_at_most(16):
        assert len(_bars(a, units) or ()) == count


def test_thousands_of_citations_of_one_phrase():
    """Each had a copy of its map: of 10,000 in a post of 20,000 characters 3 GB, from a file of two."""
    size, phrase = 1000, POST["citations"][0] | {"post_char": [], "expl_char": [0, 1]}
    post = (
        POST
        | BARE
        | {"length": size, "units": [[0, size]], "citations": [phrase | {"id": f"c{n}"} for n in range(5000)]}
    )
    a = attribution("erase", "explanation[0:1]", np.arange(size, dtype=float), example_id=POST["id"])
    result = PostResult.from_dict(post | {"attributions": [a.to_dict()]})
    with held_at_most(8):
        (stretch,) = groups(result)
    assert {run["phrases"].count(" ") for run in stretch["runs"]} == {0}


def test_a_report_of_strangers_in_a_notebook():
    """``Report.from_dict`` takes any text for a verdict."""
    attack = "<img src=x onerror=alert(1)>"
    shown = html(Report.from_dict({"example_id": attack, "checks": [], "verdict": attack, "notes": [attack]}))
    assert shown is not None
    assert "<img" not in shown and shown.count("&lt;img") == 3


# --- cached posts ---


def test_a_cached_post_is_never_larger_than_what_is_read_back(tmp_path, monkeypatch):
    """One of more than 64 MiB was written, refused when it was read, and made again without end."""
    monkeypatch.setattr("probes.foreign.MAX_JSON_BYTES", 1000)
    monkeypatch.setattr("probes.results.cache.MOST_BYTES", 20_000)
    cache, name = Cache(tmp_path), f"{'a' * 32}.json"
    cache.write(name, {"values": [0.5] * 3000})
    assert cache.read(name) == {"values": [0.5] * 3000}
    with pytest.raises(ProbeInputError, match=r"the maps of this post take \d+ bytes \(at most 20000\); ask for fewer"):
        cache.write(name, {"values": [0.5] * 5000})
    assert cache.read(name) == {"values": [0.5] * 3000}


def test_fifty_maps_of_the_longest_post_can_be_kept():
    assert len(str(-1 / 3)) * MOST_CHARACTERS * 40 < MOST_BYTES
