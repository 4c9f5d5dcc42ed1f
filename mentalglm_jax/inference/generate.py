"""Answers to prompts and records, and the ``generations.jsonl`` file; ``decode`` and ``scoring`` do the work."""

import csv
import dataclasses
import io
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from mentalglm_jax.data.cells import to_cell
from mentalglm_jax.data.records import Post
from mentalglm_jax.devices.together import check_same, held_by_primary, on_primary, stopping_together
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import working_on, write_bytes, write_text
from mentalglm_jax.foreign import Fields, first_line, parse_json, read_bytes
from mentalglm_jax.inference.calibration import Calibration, fit_calibration, log_odds
from mentalglm_jax.inference.decode import Progress, Sampling, batches, check_ids, default_room, generate_ids
from mentalglm_jax.inference.scoring import explanation_ids, label_ids, score_labels
from mentalglm_jax.inference.spoken import Spoken
from mentalglm_jax.model.fingerprint import model_fingerprint
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer

__all__ = [
    "Calibration",
    "Sampling",
    "answer_text",
    "check_unfinished",
    "explanation_ids",
    "fit_calibration",
    "forget_partial",
    "generate",
    "generate_ids",
    "generate_records",
    "generation_row",
    "label_ids",
    "log_odds",
    "model_fingerprint",
    "partial_file",
    "score_labels",
    "write_rows",
]  # fmt: skip

MAX_PARTIAL_BYTES = 4 << 30  # of unfinished answers


@overload
def generate(
    model: Glm, tokenizer: GlmTokenizer, prompts: str, max_new_tokens: int | None = None, temperature: float = 0.0, *,
    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float = 1.0, seed: int = 0,
    batch_size: int = 32, system: str | None = None, share_prefix: bool = False,
    stream: Callable[[int, str], None] | None = None, progress: Progress | None = None,
) -> str: ...  # fmt: skip


@overload
def generate(
    model: Glm, tokenizer: GlmTokenizer, prompts: list[str] | tuple[str, ...], max_new_tokens: int | None = None,
    temperature: float = 0.0, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0, batch_size: int = 32, system: str | None = None, share_prefix: bool = False,
    stream: Callable[[int, str], None] | None = None, progress: Progress | None = None,
) -> list[str]: ...  # fmt: skip


def generate(
    model: Glm,
    tokenizer: GlmTokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    system: str | None = None,
    share_prefix: bool = False,
    stream: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
) -> str | list[str]:
    """Answers of the model as ``answer_text``, each prompt being a user turn of its own chat; see ``generate_ids``. One
    prompt, given as text alone, has one answer.

    ``stream`` is called with the number of a prompt and the next piece of its answer, which may be several tokens: a
    character is not passed on in parts.
    """
    alone = [prompts] if isinstance(prompts, str) else list(prompts)
    if wrong := next((prompt for prompt in alone if not isinstance(prompt, str)), None):
        raise InputError(f"generate: a prompt must be text, got {type(wrong).__name__}; token ids go to generate_ids")
    spoken = [Spoken(tokenizer) for _ in alone]

    def say(number: int, token: int) -> None:
        assert stream is not None
        if text := spoken[number].add(token).text:
            stream(number, text)

    outputs = generate_ids(
        model, [tokenizer.prompt_ids(prompt, system) for prompt in alone], max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, batch_size=batch_size,
        vocab_limit=tokenizer.vocab_size, share_prefix=share_prefix, stream=say if stream else None, progress=progress
    )  # fmt: skip
    if stream is not None:
        for number, one in enumerate(spoken):
            if text := one.end().text:
                stream(number, text)
    answers = [answer_text(tokenizer, ids) for ids in outputs]
    return answers[0] if isinstance(prompts, str) else answers


def answer_text(tokenizer: GlmTokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens and without what opens and closes an answer (GLM's line break,
    Llama 2's spaces)."""
    return tokenizer.decode(ids).removeprefix(tokenizer.answer_lead).removesuffix(tokenizer.answer_trail)


def generation_row(
    record: Post, tokenizer: GlmTokenizer, prompt_ids: list[int], output_ids: list[int]
) -> dict[str, Any]:
    """One row of ``generations.jsonl``: the record, what the model was given and gave, and what that says.

    ``output_ids`` are as generated, stop token included; ``output_text`` is their text without it. ``finish`` is "stop"
    where the model ended its answer, "length" where the token limit did; such an answer is never "ok", with an
    explanation it is "cut_off". ``candidates`` are the label sentences of the task, ``label_text`` the one that stands
    in the output.
    """
    finish = "stop" if output_ids and output_ids[-1] in tokenizer.eos_ids else "length"
    text = answer_text(tokenizer, output_ids)
    task = tasks.get_task(record.task)
    parsed = tasks.parse(task, record.language, text)
    if finish == "length" and (span := parsed.label_span) is not None:
        last = not text[span[1] :].strip(" *_`.。!！\n")
        if last and task.read_sentence(text[slice(*span)], record.language) is None:  # "level 1" of "level 10"
            parsed = dataclasses.replace(parsed, labels=None, label_span=None, status="unknown_label")
    label: str | list[str] | None = None
    if parsed.labels is not None:
        label = parsed.labels[0] if task.arity == "single" else list(parsed.labels)
    return (
        record.to_dict()
        | tasks.row_definition(task.name)
        | {
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            "output_text": text,
            "finish": finish,
            "parsed_label": label,
            "parsed_explanation": parsed.explanation,
            "parse_status": "cut_off" if finish == "length" and parsed.status == "ok" else parsed.status,
            "label_text": text[slice(*parsed.label_span)] if parsed.label_span is not None else None,
            "candidates": task.candidates(record.language),
        }
    )


def generate_records(
    model: Glm,
    tokenizer: GlmTokenizer,
    records: Sequence[Post],
    *,
    out_path: str | Path,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    system: str | None = None,
    keep_partial: bool = False,
    replace: bool = True,
    fingerprint: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Answers every record, or post without label, and writes ``out_path`` (``write_rows``), in the order given; a row
    says in ``answered_by`` which model that was.

    The ids of finished batches are kept in ``<out_path>.partial``; after an interruption the same call goes on from
    there. All else of a row is made anew, so that a label that was mended meanwhile is the mended one. A record's draws
    depend on ``seed`` and its id only. Of several processes that share a model (``mesh_of``), all are called with the
    same records, the primary one writes, and all return all rows.

    Args:
        system: a system turn before every post; None is the one of its task, if it has one.
        keep_partial: leave the finished batches there (``partial_file``), so that the same call gives the same rows
            without generating again, until the caller has done what it wants them for (``forget_partial``).
        replace: whether finished answers may be replaced (``check_unfinished``).
        fingerprint: of ``model`` before its adapter was merged (``model_fingerprint``): the last bits of a sum depend
            on the mesh, those of base and adapter do not, so that another mesh can go on. None is ``model``'s own.

    Returns:
        The rows written.

    Raises:
        InputError: as ``generate_ids``, naming the record; two records with one id; the partial file was left by
            another model or other options, or is damaged; or there are finished answers.
        RunError: the file system refused, or another process writes the same file.
        Interrupted, Preempted: in a run of several processes, a signal arrived at one of them.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    prompts, max_new_tokens = prompts_of(model, tokenizer, records, system, max_new_tokens)
    out_path = Path(out_path)
    by = fingerprint or model_fingerprint(model)
    made_by = {"model": by, "sampling": dataclasses.asdict(sampling), "seed": seed,
               "max_new_tokens": max_new_tokens, "eos_ids": list(tokenizer.eos_ids)}  # fmt: skip
    partial = partial_file(out_path)

    def row(record: Post, ids: list[int]) -> dict[str, Any]:
        return generation_row(record, tokenizer, prompts[record.id], ids) | {"answered_by": by}

    with held_by_primary(lambda: working_on(out_path)):
        if not replace:
            on_primary(lambda: check_unfinished(out_path))
        left = on_primary(lambda: open_partial(partial, made_by, tokenizer.vocab_size))
        rows = {record.id: row(record, left[record.id]["output_ids"]) for record in records
                if record.id in left and left[record.id]["prompt_ids"] == prompts[record.id]}  # fmt: skip
        todo = [record for record in records if record.id not in rows]
        if progress is not None and rows:
            progress(len(rows), len(records))
        with stopping_together("generating") as check:
            for batch in batches(
                model, [prompts[record.id] for record in todo], [f"record {record.id!r}" for record in todo],
                [zlib.crc32(record.id.encode()) for record in todo], max_new_tokens=max_new_tokens,
                eos_ids=tokenizer.eos_ids, sampling=sampling, seed=seed, batch_size=batch_size,
                vocab_limit=tokenizer.vocab_size
            ):  # fmt: skip
                fresh = [row(todo[i], ids) for i, ids in batch]
                on_primary(lambda fresh=fresh: append_rows(partial, fresh))
                rows |= {one["id"]: one for one in fresh}
                if progress is not None:
                    progress(len(rows), len(records))
                check()
        ordered = [rows[record.id] for record in records]

        def finish() -> None:
            write_rows(out_path, ordered)
            if not keep_partial:
                partial.unlink(missing_ok=True)

        on_primary(finish)
        return ordered


def prompts_of(
    model: Glm, tokenizer: GlmTokenizer, records: Sequence[Post], system: str | None, max_new_tokens: int | None
) -> tuple[dict[str, list[int]], int]:
    """The prompt of every record by its id, and the tokens that an answer may have.

    Raises:
        InputError: as ``generate_records``.
    """
    prompts: dict[str, list[int]] = {}
    for record in records:
        try:
            prompts[record.id] = tokenizer.prompt_ids(record.prompt, system or record.system)
        except InputError as error:
            raise InputError(f"record {record.id!r}: {error}") from None
    if len(prompts) != len(records):
        ids = [record.id for record in records]
        raise InputError(f"record {next(i for i in ids if ids.count(i) > 1)!r} is given twice; ids must differ")
    check_same("posts", prompts)
    max_new_tokens = default_room(model, list(prompts.values())) if max_new_tokens is None else max_new_tokens
    for record_id, prompt in prompts.items():
        check_ids(model, f"record {record_id!r}", prompt, max_new_tokens, "max_new_tokens")
    return prompts, max_new_tokens


def check_unfinished(out_path: Path) -> None:
    """Refuses to write over answers that are finished: those of another model, or to other posts, would be gone, and
    so would be hours. Where some are half done beside them (``partial_file``), the same call goes on.

    Raises: InputError.
    """
    _refuse_link(partial_file(out_path))
    if os.path.lexists(out_path) and not partial_file(out_path).exists():
        if out_path.is_file() and out_path.stat().st_size == 0:
            return
        raise InputError(f"{out_path}: is there already, and finished answers are not written over; name another "
                         "place, or delete it")  # fmt: skip


def forget_partial(out_path: str | Path) -> None:
    """Deletes what ``keep_partial`` left."""
    on_primary(lambda: partial_file(Path(out_path)).unlink(missing_ok=True))


_COLUMNS = ("id", "task", "language", "post", "label", "explanation", "finish", "status")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes answers as JSONL, or where the name ends in ``.csv`` as a table for a spreadsheet: what was asked, the
    label (several joined by ``;``), the explanation, how the answer ended and could be read, and, where they are known,
    a column of probabilities per label and whether these are calibrated. A new file is its owner's only."""
    path = Path(path)
    if path.suffix.lower() != ".csv":
        write_text(path, _jsonl(rows), private=True)
        return
    keys = list(dict.fromkeys(key for row in rows for key in row.get("label_probabilities", ())))
    text = io.StringIO()
    writer = csv.writer(text)
    said_how = ["calibrated"] if keys else []
    writer.writerow([*_COLUMNS, *(to_cell(f"p({key})") for key in keys), *said_how])
    for row in rows:
        label, values = row["parsed_label"], row.get("label_probabilities", {})
        said = label if isinstance(label, str) else ";".join(label or ())
        cells = [to_cell(row["id"], name=True), row["task"], row["language"], to_cell(row["post"]), to_cell(said),
                 to_cell(row["parsed_explanation"] or ""), row["finish"], row["parse_status"]]  # fmt: skip
        chances = [f"{values[key]:.6f}" if key in values else "" for key in keys]
        calibrated = "" if not values else "yes" if row.get("probabilities_calibrated") else "no"
        writer.writerow([*cells, *chances, *(calibrated for _ in said_how)])
    write_bytes(path, text.getvalue().encode("utf-8-sig"), private=True)  # the mark by which Excel knows UTF-8


def partial_file(out_path: Path) -> Path:
    """Where ``generate_records`` keeps its finished batches."""
    return out_path.with_name(out_path.name + ".partial")


_KEPT = ("id", "prompt_ids", "output_ids")
_MOST_IDS, _MOST_ID = 1 << 22, (1 << 31) - 1


def open_partial(path: Path, made_by: dict[str, Any], vocab_size: int) -> dict[str, dict[str, Any]]:
    """``prompt_ids`` and ``output_ids`` of unfinished work, by id; the first line of its file says what made them."""
    header = (json.dumps({"made_by": made_by}) + "\n").encode()
    _refuse_link(path)
    try:
        data = read_bytes(path, MAX_PARTIAL_BYTES) if path.exists() else b""
        if not (data.startswith(header) or header.startswith(data)):  # before it is changed: it may be the user's
            raise InputError(
                f"{path}: was left by another model or other options; delete it to start over, "
                "or go on with the model and options it was begun with"
            )
        whole = data[: data.rfind(b"\n") + 1] or header  # what a crash cut short is generated again
        if whole == header:
            write_bytes(path, header, private=True)
        elif len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise _cannot_write(path, error) from error
    _, *lines = whole.splitlines()
    try:
        kept: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=2):
            where = f"{path}:{number}"
            raw = parse_json(line, where)
            if not isinstance(raw, dict):
                raise InputError(f"{where}: not a row")
            row = Fields(raw, where)
            ids = {"prompt_ids": row.integers("prompt_ids", 0, _MOST_ID, most=_MOST_IDS),
                   "output_ids": row.integers("output_ids", 0, vocab_size - 1, most=_MOST_IDS)}  # fmt: skip
            kept[row.text("id")] = {key: list(value) for key, value in ids.items()}
        return kept
    except InputError as error:
        raise InputError(f"{path}: is damaged ({first_line(error)}); delete it to start over") from None


def _refuse_link(path: Path) -> None:
    """What it leads to would be cut and written. Raises: InputError."""
    if path.is_symlink():
        raise InputError(f"{path}: is a link; half-done answers are kept in a file of that name, remove the link")


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds finished rows to what ``open_partial`` opened. Raises: RunError where the file system refuses."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_jsonl([{key: row[key] for key in _KEPT} for row in rows]))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot write ({error.strerror or error}); rows written before are kept")


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def count_unread(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of rows of ``generations.jsonl``: ``rows``, those without a readable label (``no_label``), and those with a label
    but no explanation (``no_explanation``): right after training data that explains nothing, as some published sets;
    and those that the token limit cut off (``cut_off``)."""
    read = [row for row in rows if row["parsed_label"] is not None]
    bare = sum(row["parsed_explanation"] is None for row in read)
    cut = sum(row.get("finish") == "length" for row in rows)
    return {"rows": len(rows), "no_label": len(rows) - len(read), "no_explanation": bare, "cut_off": cut}
