"""A corpus where one phrase decides, and a GLM trained on it in seconds: the truth that saliency has to find."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import GlmForCausalLM, PreTrainedTokenizerFast

from probes.probe import Probe
from tests.probes.tiny import boilerplate, make_model, make_row, make_tokenizer

FILLERS = ["昨晚下了雨", "外面风很大", "朋友来家里吃饭", "我去了图书馆"]
FILLERS += ["公司又要加班", "猫在窗边睡觉", "地铁里人很多", "中午吃了面条"]
CUES = {"high": ["感觉活着没有意义", "不想再醒过来"], "low": ["心情还算不错", "对明天有点期待"]}


def planted_rows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[dict[str, Any]]:
    """Posts of four or five clauses, one of them a cue that decides the label and that the explanation quotes."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = rng.choice(["high", "low"])
        cue = rng.choice(CUES[label])
        clauses = rng.sample(FILLERS, rng.randint(3, 4))
        clauses.insert(rng.randrange(len(clauses) + 1), cue)
        rows.append(make_row(tokenizer, index, "zh", "，".join(clauses) + "。", cue, label))
    return rows


def train_planted(steps: int = 100, batch: int = 16, seed: int = 0) -> Probe:
    """A two-layer GLM that gives the right label and quotes the right cue."""
    phrases = "，".join([*FILLERS, *CUES["high"], *CUES["low"]])
    tokenizer = make_tokenizer([f"{phrases}。{boilerplate('zh')}帖子提到“”。"] * 2, 420)
    model: GlmForCausalLM = make_model(tokenizer, seed=seed, initializer_range=0.05)
    rows = [[*row["prompt_ids"], *row["output_ids"]] for row in planted_rows(tokenizer, 400, seed)]
    prompts = [len(row["prompt_ids"]) for row in planted_rows(tokenizer, 400, seed)]
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        chosen = rng.sample(range(len(rows)), batch)
        size = max(len(rows[index]) for index in chosen)
        ids = torch.zeros(batch, size, dtype=torch.long)
        wanted = torch.full((batch, size), -100)
        for at, index in enumerate(chosen):
            ids[at, : len(rows[index])] = torch.tensor(rows[index])
            wanted[at, prompts[index] : len(rows[index])] = ids[at, prompts[index] : len(rows[index])]
        optimizer.zero_grad()
        model(input_ids=ids, labels=wanted).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return Probe(model.eval(), tokenizer, "planted")
