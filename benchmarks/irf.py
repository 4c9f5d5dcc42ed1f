"""IRF, or its twin in made-up words, as rows for the probes; and the model that answers its two questions.

For ``benchmarks.rationales``, which says what they are for.
"""

from __future__ import annotations

import csv
import functools
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mentalglm_jax.data.records import Record
from mentalglm_jax.text.tasks import TASKS
from probes.errors import RowRefused
from probes.intake.rows import Reader, lay
from probes.probe import Probe
from probes.records import Example, Span

TASK = TASKS["imhi_irf"]
QUESTIONS = dict(zip(("belong", "burden"), TASK.all_questions("en"), strict=True))
ANSWERS = {label: TASK.sentence([label], "en") for label in ("yes", "no")}
TEMPLATE = "[gMASK]<sop>{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}{% endfor %}<|assistant|>\n"


# --- Data: IRF, and its twin in made-up words ---


def twin(directory: Path, count: int = 600, seed: int = 0) -> Path:
    """IRF's columns in made-up words: a phrase of three words, the first of which decides; nothing else is real."""
    rng = random.Random(seed)
    words: list[str] = []
    while len(words) < 60:
        word = "".join(rng.choice("bdgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        words += [word] * (word not in words)
    keys = {"belong": words[:4], "burden": words[4:8]}
    for part, size in (("train", count), ("val", count // 10), ("test", count // 4)):
        with open(directory / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["text", "belong", "belong_exp", "burden", "burden_exp"])
            for _ in range(size):
                parts = [[rng.choice(words[8:]) for _ in range(rng.randint(3, 5))] for _ in range(rng.randint(4, 7))]
                row: dict[str, str] = {}
                for place, name in enumerate(keys):
                    shows = rng.random() < 0.5
                    if shows:
                        parts[place] = [rng.choice(keys[name]), *parts[place][:2]]
                    row |= {name: str(int(shows)), f"{name}_exp": " ".join(parts[place]) if shows else ""}
                rng.shuffle(parts)
                text = ", ".join(" ".join(part) for part in parts)
                out.writerow([text, row["belong"], row["belong_exp"], row["burden"], row["burden_exp"]])
    return directory


def words_of(post: str) -> list[Span]:
    """Character spans of what spaces part."""
    return [match.span() for match in re.finditer(r"\S+", post)]


def asked(reader: Reader, records: Sequence[Record], label: str | None = None) -> list[dict[str, Any]]:
    """Rows of generations.jsonl: the package's question by the model's own template, answered with ``label``, or with
    each record's own. What cannot be probed is left out and counted."""
    given = []
    for record in records:
        at, said = TASK.prompt("\0", record.question, "en").index("\0"), label or str(record.label)
        one = {"id": record.id, "post": [at, at + len(record.post)], "label": said, "candidates": ANSWERS,
               "answer": ANSWERS[said], "rationales": [list(span) for span in record.rationales or ()]}  # fmt: skip
        turns = [{"role": "user", "content": record.prompt}]
        given.append(one | ({"messages": turns} if reader.template else {"prompt": record.prompt + "\n"}))
    laid = lay(reader, given)
    for reason, count in Counter(one["reason"] for one in laid.left_out).items():
        print(f"{count} of {len(given)} posts left out: {reason}", file=sys.stderr)
    return laid.rows


def encoded(probe: Probe, reader: Reader, records: Sequence[Record]) -> list[Example]:
    """Each record answered with yes, whatever people or the model say; those too long for the model left out."""
    found = []
    for row in asked(reader, records, "yes"):
        try:
            found.append(probe.encode(row))
        except RowRefused as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


# --- The model that answers ---


def trained(records: Sequence[Record], directory: Path, steps: int, seed: int) -> Path:
    """Trains a GLM of two layers from scratch to answer both questions, and saves it as a model directory."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*(record.prompt for record in records), *ANSWERS.values()]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    core.add_special_tokens(specials)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=specials[0], pad_token=specials[0]
    )
    torch.manual_seed(seed)
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attention_bias=True, max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model: Any = transformers.GlmForCausalLM(config).train()
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [row for row in asked(Reader(directory), records) if len(row["prompt_ids"]) < 400]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = random.Random(seed)
    for _ in range(steps):
        loss = answer_loss(model, rng.choices(rows, k=16))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(directory)
    return directory


def answer_loss(model: Any, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Mean -log p of all tokens of the answers: which answer it is, the first of them alone may say."""
    ids = [[*row["prompt_ids"], *row["output_ids"]] for row in rows]
    size = max(map(len, ids))
    batch = torch.zeros(len(ids), size, dtype=torch.long)
    wanted = torch.full_like(batch, -100)
    for at, (one, row) in enumerate(zip(ids, rows, strict=True)):
        batch[at, : len(one)] = torch.tensor(one)
        wanted[at, len(row["prompt_ids"]) : len(one)] = batch[at, len(row["prompt_ids"]) : len(one)]
    mask = (torch.arange(size) < torch.tensor([len(one) for one in ids])[:, None]).long()
    hidden = model.model(input_ids=batch[:, :-1], attention_mask=mask[:, :-1]).last_hidden_state
    said = wanted[:, 1:] >= 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[said]), wanted[:, 1:][said])


@dataclass(frozen=True)
class Asked:
    """One question about one post, to one model, and the model's answer to any other text in the post's place."""

    probe: Probe
    example: Example

    @functools.cached_property
    def words(self) -> list[Span]:
        return words_of(self.example.post)

    @functools.cached_property
    def marked(self) -> np.ndarray:
        """bool ``[words]``: what people marked."""
        spans = self.example.rationales or ()
        return np.array([any(a < end and b > start for start, end in spans) for a, b in self.words])

    def odds(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds of the label with each text as the post, float64 ``[texts]``, nats."""
        example, encode = self.example, self.probe.token_bytes.plain
        start, label, others, _ = self.probe.scorer.label_ids(example)
        end = sum(at < example.byte_spans[start][0] for at in example.char_bytes[:-1])
        before, after = example.text[: example.post_char[0]], example.text[example.post_char[1] : end]
        prompts = [encode(before + text + after) for text in texts]
        sequences = [[*prompt, *answer] for prompt in prompts for answer in (label, *others)]
        starts = [len(prompt) for prompt in prompts for _ in (label, *others)]
        found = self.probe.scorer.logprobs(sequences, starts).reshape(len(texts), -1)
        return (found[:, 0] - found[:, 1:].logsumexp(1)).numpy()
