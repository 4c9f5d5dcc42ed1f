"""People check the explanations: a sample as one offline form, the raters' files merged, their agreement.

Four scales, 0 to 3, as in IMHI's human evaluation: consistency, reliability, professionality, overall. Agreement by
Fleiss' kappa (``statsmodels``) and Krippendorff's ordinal alpha (``krippendorff``); the [data] extra.
"""

import base64
import csv
import hashlib
import io
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from mentalglm_jax.data.cells import FORMULA, INNER, VALUE, from_cell, to_cell
from mentalglm_jax.data.explain.replies import readable
from mentalglm_jax.data.intake.delimited import guess_said, told_delimiter, told_encoding
from mentalglm_jax.data.records import Record, read_records, records_text, write_records
from mentalglm_jax.data.splits import one_name
from mentalglm_jax.data.tables import read_named_rows
from mentalglm_jax.data.written import check_same
from mentalglm_jax.errors import InputError, install
from mentalglm_jax.files import working_in, write_json, write_text
from mentalglm_jax.foreign import parse_json, read_text
from mentalglm_jax.markdown import seen
from mentalglm_jax.text import tasks

SCALES = ("consistency", "reliability", "professionality", "overall")
POINTS = (0, 1, 2, 3)
Origin = Literal["experts", "model"]  # whose label a form shows
_WRITTEN = ("reviewed.jsonl", "accepted.jsonl", "agreement.json")  # by ``import_review``
_LARGEST_RATINGS = 64 << 20  # bytes
_LONGEST_CELL = 32_000  # characters; a cell has room for 32,767
FAR_APART = 2  # points between two raters from which an item is listed as a disagreement


# --- export ---


def answered(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Rows of ``generations.jsonl`` as records that say what the model said: its label and explanation in place of the
    gold ones. Answers without label or explanation are left out: there is nothing to rate.

    Raises: InputError on a row that is none.
    """
    found = []
    for row in rows:
        record, said, reason = (
            Record.from_dict(row, allow_extra=True),
            row.get("parsed_label"),
            row.get("parsed_explanation"),
        )
        if said and reason:
            labels = {"label": said} if record.labels is None else {"labels": tuple(said)}
            found.append(replace(record, explanation=str(reason), **labels))
    return found


def stratified_sample(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """At most ``count`` records that have an explanation, as evenly as possible over task and first label, in random
    order. A rare class is taken whole before a common one is taken again."""
    draw = random.Random(seed)
    strata: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda one: one.id):
        if record.explanation:
            strata.setdefault((record.task, record.gold[0]), []).append(record)
    for rows in strata.values():
        draw.shuffle(rows)
    chosen: list[Record] = []
    while len(chosen) < count and any(strata.values()):
        for key in sorted(strata):
            if strata[key] and len(chosen) < count:
                chosen.append(strata[key].pop())
    draw.shuffle(chosen)
    return chosen


def export_review(records: Sequence[Record], folder: str | Path, *, count: int = 200, seed: int = 0,
                  language: str = "zh", labels_by: Origin = "experts") -> dict[str, Any]:  # fmt: skip
    """Writes ``review.html`` (the form), ``review.csv`` (the same for a spreadsheet) and ``sample.jsonl`` (what was
    sampled; ``import`` needs it) into ``folder``.

    Args:
        language: of the form's own words, "en" or "zh".
        labels_by: whose labels they are, which the form says: the gold ones, or the model's own (``answered``).

    Returns: ``form`` (its id) and ``items``.

    Raises: InputError if no record has an explanation, two have one id, ``folder`` holds another form or a sheet that
        was filled in, or the [data] extra is missing.
    """
    folder = Path(folder)
    sample = stratified_sample(records, count, seed)
    if not sample:
        raise InputError("review export: no record has an explanation; give the output of `mentalglm data build`")
    if twice := [one for one, count in Counter(record.id for record in sample).items() if count > 1]:
        raise InputError(f"review export: id {twice[0]!r} stands in two of the files; ratings need ids that differ")
    form = form_id(sample)
    texts = {"review.html": render_form(sample, language, labels_by), "review.csv": _sheet(sample, form, labels_by),
             "sample.jsonl": records_text(sample)}  # fmt: skip
    own = tasks.added_tasks(record.task for record in sample)
    with working_in(folder):
        check_same(folder, texts, "somebody may be rating with it")
        tasks.keep_tasks(folder, own)
        for name, text in texts.items():
            write_text(folder / name, text, private=True)
    return {"form": form, "items": len(sample)}


def form_id(sample: Iterable[Record]) -> str:
    """A short hash of what is rated: ratings of another sample are recognised by it."""
    lines = (json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True) for record in sample)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def render_form(sample: Sequence[Record], language: str, labels_by: Origin = "experts") -> str:
    """The form as one HTML page: no network, style and script named by hash in its Content-Security-Policy, every word
    of the data put in as text."""
    try:
        import jinja2
    except ImportError:
        raise InputError(f"the review form needs the data extra: {install('data')}") from None
    assets = resources.files("mentalglm_jax") / "assets" / "review"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("form.html", "style.css", "script.js")}
    known = yaml.safe_load((assets / "words.yaml").read_text(encoding="utf-8"))
    if language not in known:
        raise InputError(f"review form: no language {language!r}; available: {', '.join(known)}")
    words = known[language]
    items = [{"id": r.id, "task": r.task, "post": seen(r.post), "question": seen(r.question),
              "explanation": seen(r.explanation or ""),
              "label": seen(tasks.get_task(r.task).sentence(r.gold, r.language))} for r in sample]  # fmt: skip
    said = {name: words[name] for name in ("saved", "unsaved", "name_first")}
    data = json.dumps({"form": form_id(sample), "scales": SCALES, "items": items, "words": said,
                       "formula": FORMULA, "inner": INNER, "value": VALUE}, ensure_ascii=False)  # fmt: skip
    for character in "<>&\u2028\u2029":  # neither a tag nor a line end of JavaScript can come out of the data
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = (
        f"default-src 'none'; style-src '{_hash(read['style.css'])}'; script-src '{_hash(read['script.js'])}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(read["form.html"]).render(
        language=language, csp=policy, style=read["style.css"], script=read["script.js"], data=data, words=words,
        label=words["label"][labels_by],
        scales=[{"key": key, **words["scales"][key]} for key in SCALES],
    )  # fmt: skip


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _sheet(sample: Sequence[Record], form: str, labels_by: Origin) -> str:
    """CSV with a byte-order mark (spreadsheets take it as UTF-8); every cell that could be something else is text."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    whose = {"experts": "label", "model": "model_label"}[labels_by]
    writer.writerow(["form", "rater", "id", *SCALES, "comment", "task", "post", whose, "explanation"])
    for record in sample:
        label = tasks.get_task(record.task).sentence(record.gold, record.language)
        blank = ("",) * (len(SCALES) + 1)
        names = form, "", record.id
        texts = (*blank, record.task, *map(_shortened, (record.post, label, record.explanation or "")))
        writer.writerow([*(to_cell(one, name=True) for one in names), *map(to_cell, texts)])
    return "\ufeff" + buffer.getvalue()


def _shortened(text: str) -> str:
    """What a cell of a spreadsheet holds; a longer one would be cut there without a word, and not be read back."""
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]} … (the form, review.html, has all of it)"


# --- import ---


@dataclass(frozen=True)
class Ratings:
    """One rater's file: item id -> scale -> points (a scale may be left out), and comments."""

    rater: str
    scores: dict[str, dict[str, int]]
    comments: dict[str, str]


def read_ratings(path: str | Path, form: str, ids: Iterable[str]) -> Ratings:
    """A file the form downloaded (JSON or CSV), or ``review.csv`` filled in.

    Raises: InputError naming file, row and column: another form, an unknown item, a score outside 0 to 3, no rater.
    """
    path = Path(path)
    rows = _csv_ratings(path) if path.suffix.lower() == ".csv" else _json_ratings(path)
    known = set(ids)
    scores: dict[str, dict[str, int]] = {}
    comments: dict[str, str] = {}
    raters: set[str] = set()
    for where, of_form, rater, item, values, comment in rows:
        if of_form != form:
            raise InputError(f"{path}{where}: is of form {of_form!r}, the sample is {form!r}; import its own sample")
        if item not in known:
            raise InputError(f"{path}{where}: item {item!r} is not in the sample")
        if item in scores:
            raise InputError(f"{path}{where}: item {item!r} stands there twice")
        given = {}
        for scale, value in values.items():
            if value is None or value == "":
                continue
            if str(value) not in ("0", "1", "2", "3"):
                raise InputError(f"{path}{where}, {scale!r}: expected 0, 1, 2 or 3, found {str(value)[:12]!r}")
            given[scale] = int(value)
        if given:
            scores[item] = given
            raters.add(rater.strip())
        if comment.strip():
            comments[item] = comment.strip()
    if not scores:
        raise InputError(f"{path}: holds no rating")
    if len(raters) != 1 or not next(iter(raters)):
        raise InputError(f"{path}: expected the name of one rater, found {', '.join(sorted(raters)) or 'none'}")
    return Ratings(raters.pop(), scores, comments)


_Rated = tuple[str, str, str, str, dict[str, Any], str]


def _json_ratings(path: Path) -> Iterable[_Rated]:
    try:
        text = read_text(path, _LARGEST_RATINGS).removeprefix("\ufeff")
        raw = parse_json(text, str(path), "download it again", half_pairs=True)
        form, rater, ratings = raw["form"], raw["rater"], raw["ratings"]
        texts = [form, rater, *(given.get("comment") or "" for given in ratings.values())]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror}); check the path") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a file of this form; it needs form, rater and ratings") from None
    for item, given in ratings.items():
        values = {scale: given.get(scale) for scale in SCALES}
        yield f", item {item!r}", form, readable(rater), item, values, readable(given.get("comment") or "")


def _csv_ratings(path: Path) -> Iterable[_Rated]:
    columns = ("form", "rater", "id", *SCALES, "comment")
    encoding = told_encoding(path)  # Excel saves what it opened as its country does
    for said in guess_said(encoding):
        warnings.warn(f"{path}: {said}", stacklevel=3)
    for line, row in read_named_rows(path, columns, told_delimiter(path, encoding, columns), encoding=encoding):
        cells = {name: from_cell(cell) for name, cell in row.items()}
        values = {scale: cells[scale].strip() for scale in SCALES}
        yield f":{line}", cells["form"], cells["rater"], cells["id"], values, cells["comment"]


def agreement(ratings: Sequence[Ratings], ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per scale: mean, ``fleiss_kappa`` (over items that every rater rated), Krippendorff's ordinal ``alpha`` (all
    items), and the numbers they rest on. None where it is undefined: one rater, or only one value given.

    Raises: InputError if the [data] extra is missing.
    """
    try:
        import krippendorff
        from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa
    except ImportError:
        raise InputError(f"agreement needs the data extra: {install('data')}") from None
    found = {}
    for scale in SCALES:
        table = np.array([[one.scores.get(item, {}).get(scale, np.nan) for item in ids] for one in ratings], float)
        given = table[~np.isnan(table)]
        varied = len(np.unique(given)) > 1
        paired = table[:, (~np.isnan(table)).sum(0) > 1]
        full = table[:, ~np.isnan(table).any(0)]
        kappa = alpha = None
        if len(ratings) > 1 and full.size and len(np.unique(full)) > 1:
            counts, _ = aggregate_raters(full.T.astype(int), n_cat=len(POINTS))
            kappa = float(fleiss_kappa(counts))
        if varied and paired.size and len(np.unique(paired[~np.isnan(paired)])) > 1:
            alpha = float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))
        found[scale] = {"mean": float(given.mean()) if given.size else None, "ratings": int(given.size),
                        "fleiss_kappa": kappa, "items_rated_by_all": int(full.shape[1]),
                        "krippendorff_alpha": alpha, "items_rated_twice": int(paired.shape[1])}  # fmt: skip
    return found


def import_review(folder: str | Path, files: Sequence[str | Path], *, accept_at: float = 2.0) -> dict[str, Any]:
    """Merges the raters' files with the sample in ``folder``; writes ``reviewed.jsonl`` (each record with its mean
    ratings and whether it is accepted), ``accepted.jsonl`` (records alone) and ``agreement.json`` there.

    Args:
        accept_at: a record is accepted if the mean over raters reaches this on every scale.

    Returns: ``raters``, ``items``, ``rated``, ``accepted``, ``agreement``, ``tasks`` (the last four for each task
    alone), ``disagreements`` (items on which two raters are two or more points apart, with everybody's scores).

    Raises: InputError naming the file that is wrong, or a rater who comes twice.
    """
    folder = Path(folder)
    sample = read_records(folder / "sample.jsonl")
    ids = [record.id for record in sample]
    form = form_id(sample)
    ratings: list[Ratings] = []
    for file in files:
        if Path(file).resolve() in [(folder / name).resolve() for name in _WRITTEN]:
            raise InputError(f"{file}: would be replaced by what is made of it; give it another name")
        one = read_ratings(file, form, ids)
        if one_name(one.rater) in [one_name(other.rater) for other in ratings]:
            raise InputError(f"{file}: rater {one.rater!r} was already read from another file; give each file once")
        ratings.append(one)
    if not ratings:
        raise InputError("review import: give at least one file of ratings")
    rows, accepted, apart = [], [], []
    for record in sample:
        given = {one.rater: one.scores[record.id] for one in ratings if record.id in one.scores}
        by_scale = {scale: [scores[scale] for scores in given.values() if scale in scores] for scale in SCALES}
        means = {scale: sum(values) / len(values) if values else None for scale, values in by_scale.items()}
        complete = all(value is not None for value in means.values())
        good = all(value is not None and value >= accept_at for value in means.values()) if complete else None
        comments = {one.rater: one.comments[record.id] for one in ratings if record.id in one.comments}
        rows.append(record.to_dict() | {"ratings": means, "raters": len(given), "accepted": good, "comments": comments})
        if good:
            accepted.append(record)
        far = [s for s, values in by_scale.items() if values and max(values) - min(values) >= FAR_APART]
        if far:
            apart.append({"id": record.id, "scales": far, "scores": given})

    def counts(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"items": len(of), "rated": sum(row["raters"] > 0 for row in of),
                "accepted": sum(row["accepted"] is True for row in of),
                "agreement": agreement(ratings, [row["id"] for row in of])}  # fmt: skip

    names = list(dict.fromkeys(record.task for record in sample))
    result = {
        "form": form, "raters": [one.rater for one in ratings], "accept_at": accept_at, **counts(rows),
        "tasks": {name: counts([row for row in rows if row["task"] == name]) for name in names}, "disagreements": apart,
    }  # fmt: skip
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with working_in(folder):
        write_text(folder / _WRITTEN[0], lines, private=True)
        write_records(folder / _WRITTEN[1], accepted)
        write_json(folder / _WRITTEN[2], result, private=True)  # who said what of which record
    return result
