"""Models whose reasons are known: tiny language models trained on posts where one planted word decides the label.

The explanation of a *faithful* model quotes that word; that of an *unfaithful* one quotes a decoy, with labels and
quotes just as perfect. No judge of the text could tell the two apart, so a check that means anything has
to. Architecture, language, vocabulary, post length, place of the cue, order of answer and explanation, and the rule
(one cue, the same twice, two by AND or OR) vary with ``World``; a model takes seconds to train on a CPU.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from probes.citations.clauses import pieces
from probes.errors import ProbeError, ProbeInputError
from probes.probe import Probe
from probes.records import Example

ARCHITECTURES = ("glm", "llama", "gpt2", "qwen2", "glm4", "qwen3", "mistral", "gpt_neox")
RULES = ("one", "twice", "and", "or", "three", "not")
ROUNDS = 8  # of training, at most; nearly all need one, three weak cues that decide together need four
_SPECIALS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
_ZH = (
    "天地山水风云雨雪花草树木江河湖海日月星光春夏秋冬东西南北上下左右红黄蓝绿"
    "黑白大小多少高低长短新旧快慢早晚远近书笔纸灯门窗桌椅车船米面茶酒"
)
_SYLLABLES = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
# Words that a reader knows, for posts that are to be shown to people; the other languages are made up.
_WORDS = {
    "cue0": ["rested", "hopeful", "cheerful", "relaxed"],
    "cue1": ["worthless", "desperate", "numb", "trapped"],
    "decoy0": ["garden", "kitchen", "window", "carpet"],
    "decoy1": ["bicycle", "station", "letter", "piano"],
    "filler": [
        "today", "again", "after", "dinner", "walked", "home", "early", "quiet", "morning", "still", "rain", "street",
        "later", "coffee", "then", "music", "friend", "called", "evening", "read", "book", "slept", "outside", "cold",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """One planted truth.

    Attributes:
        language: en | zh (made-up words) | words (English words that a reader knows, the same with every seed).
        faithful: the explanation quotes the cue; else it quotes the decoy.
        rule: one | twice (the cue stands twice) | and | or (two cue words; high when both, or either, are of class 1) |
            three (high when all of three are) | not (a word before the cue turns it round in half of the posts; it is
            part of the cue).
        decoy: how often the decoy is of the label's class; 0.5 is no correlation.
        first: "label" or "explanation": which the answer begins with.
        mediated: explanation first only: whether the label follows what the explanation said, or the post.
        place: any | early | late: in which third of the post the cue may stand.
        clauses: fewest and most clauses of a post; ``punctuation`` between them, or none at all.
        words: cue words per class. letters: Chinese characters of a cue word, 1 or 2; all other words have two.
        quoted: the prompt puts the post in quotation marks, and the closing one is one token with the post's last mark
            of punctuation. Prompts without that token get the third label, so that it decides as much as the cue: a map
            that takes it away with the post finds the template's mark, and not the cue alone.
    """

    architecture: str = "glm"
    language: str = "en"
    faithful: bool = True
    rule: str = "one"
    decoy: float = 0.5
    first: str = "label"
    mediated: bool = True
    place: str = "any"
    clauses: tuple[int, int] = (5, 8)
    punctuation: bool = True
    words: int = 4
    letters: int = 2
    quoted: bool = False
    layers: int = 2
    hidden: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "architecture": ARCHITECTURES,
            "language": ("en", "zh", "words"),
            "rule": RULES,
            "place": ("any", "early", "late"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ProbeInputError(f"planted world: {name} {getattr(self, name)!r}: not one of {', '.join(values)}")


@dataclass(frozen=True, eq=False)
class Planted:
    """A trained model and what it was planted with. ``accuracy``: label and quote both right, greedy, fresh posts."""

    world: World
    probe: Probe
    accuracy: float
    seconds: float

    def examples(self, count: int, seed: int = 1_000_003) -> list[Example]:
        """``rows``, laid out."""
        return [self.probe.encode(row) for row in self.rows(count, seed)]

    def rows(self, count: int, seed: int = 1_000_003) -> list[dict[str, Any]]:
        """``count`` fresh posts with the answers the model itself writes (others are passed over)."""
        found: list[dict[str, Any]] = []
        for round_ in range(20):
            rows = planted_rows(self.world, self.probe.tokenizer, 2 * count, stream(self.world, seed + round_))
            rows = [row | {"id": f"{round_}-{row['id']}"} for row in rows]
            right = answers_right(self.probe, [self.probe.encode(row) for row in rows])
            found += [row for row, good in zip(rows, right, strict=True) if good]
            if len(found) >= count:
                return found[:count]
        raise ProbeError(f"planted model {self.world}: it did not learn its task ({len(found)} right answers)")

    def cited_at_random(self, count: int, seed: int = 2_000_003) -> list[Example]:
        """Fresh posts with the labels the model writes and an explanation that quotes a clause drawn at random: nothing
        ties what is cited to what the label was made from."""
        rng, phrases = random.Random(stream(self.world, seed, "quotes")), _phrases(self.world)
        made = []
        for row in self.rows(count, seed):
            a, b = rng.choice(pieces(row["post"]))
            said = phrases["because"].format(row["post"][a:b].strip(phrases["stop"] + " "))
            like = (row["parsed_label"], said, row["cues"], row["decoys"][0])
            made.append(self.probe.encode(_row(self.world, self.probe.tokenizer, row["id"], row["post"], *like)))
        return made

    def cue_decides(self, count: int, seed: int = 1_000_003) -> float:
        """How far the planted truth is true of this model, without any attribution: the share of ``count`` fresh posts
        for which it gives the third label once filler words stand in place of the cues."""
        rng, tokenizer = random.Random(stream(self.world, seed, "fillers")), self.probe.tokenizer
        drawn = planted_rows(self.world, tokenizer, count, stream(self.world, seed))
        rows = [_blank(self.world, tokenizer, row, rng) for row in drawn]
        examples = [self.probe.encode(row | {"decoys": []}) for row in rows]  # it has moved
        return sum(answers_right(self.probe, examples, label_only=True)) / count


def stream(world: World, seed: int, what: str = "posts") -> str:
    """The seed of what is drawn for a world. The two models of a pair share it. Worlds do not, nor do the posts and
    what is drawn for them: with one stream for all, the same posts and quotations in other words would count as so many
    independent ones."""
    return f"{what} {world.seed} {seed}"


def vocabulary(world: World) -> dict[str, list[str]]:
    """Words of the world: cue0, cue1, decoy0, decoy1, filler. All differ; another seed gives others."""
    if world.language == "words":
        return {name: words if name == "filler" else words[: world.words] for name, words in _WORDS.items()}
    rng = random.Random(world.seed)
    made: list[str] = []
    while len(made) < 4 * world.words + 24:
        word = (
            "".join(rng.sample(_ZH, world.letters if len(made) < 2 * world.words else 2))
            if world.language == "zh"
            else "".join(rng.sample(_SYLLABLES, rng.randint(2, 3)))
        )
        if not any(word in other or other in word for other in made):
            made.append(word)
    names = ("cue0", "cue1", "decoy0", "decoy1")
    groups = {name: made[i * world.words : (i + 1) * world.words] for i, name in enumerate(names)}
    return groups | {"filler": made[4 * world.words :]}


def _phrases(world: World) -> dict[str, str]:
    if world.language == "zh":
        return {
            "prompt": "帖子：“{}” 问题：风险？" if world.quoted else "帖子：{} 问题：风险？",
            "closing": "”",
            "0": "风险低。",
            "1": "风险高。",
            "2": "风险无。",
            "because": "因为“{}”",
            "and": "”“",
            "not": "不",
            "stop": "，。！",
        }
    return {
        "prompt": 'post: "{}" risk?' if world.quoted else "post: {} risk?",
        "closing": '"',
        "0": " risk low.",
        "1": " risk high.",
        "2": " risk none.",
        "because": ' since "{}"',
        "and": '" "',
        "not": "not ",
        "stop": ",.!",
    }


def planted_post(world: World, rng: random.Random) -> tuple[str, int, list[tuple[int, int]], tuple[int, int]]:
    """Text of a post, its class, spans of its cues, span of its decoy."""
    groups, joint = vocabulary(world), "" if world.language == "zh" else " "
    bits = [rng.randrange(2) for _ in range({"and": 2, "or": 2, "three": 3}.get(world.rule, 1))]
    if world.rule == "three" and rng.random() < 0.4:
        bits = [1, 1, 1]  # as often as not, nearly: of three drawn freely one in eight
    label = max(bits) if world.rule == "or" else min(bits)
    cues = [rng.choice(groups[f"cue{bit}"]) for bit in bits]
    if world.rule == "not" and rng.random() < 0.5:
        label, cues = 1 - label, [_phrases(world)["not"] + cues[0]]
    cues = cues * 2 if world.rule == "twice" else cues
    decoy = rng.choice(groups[f"decoy{label if rng.random() < world.decoy else 1 - label}"])
    count = rng.randint(*world.clauses)
    clauses = [[rng.choice(groups["filler"]) for _ in range(rng.randint(1, 3))] for _ in range(count)]
    third = max(len(cues), count // 3)
    room = {"any": range(count), "early": range(third), "late": range(count - third, count)}[world.place]
    places = rng.sample(list(room), len(cues))
    elsewhere = rng.choice([i for i in range(count) if i not in places])
    planted: dict[int, tuple[str, int]] = {}
    for i, word in [*zip(places, cues, strict=True), (elsewhere, decoy)]:
        at = rng.randint(0, len(clauses[i]))
        clauses[i].insert(at, word)
        planted[i] = (word, at)
    text, spans = "", {}
    for i, words in enumerate(clauses):
        for at, word in enumerate(words):
            text += joint if text and world.language != "zh" else ""
            if i in planted and planted[i][1] == at:
                spans[i] = (len(text), len(text) + len(word))
            text += word
        text += rng.choice(_phrases(world)["stop"]) if world.punctuation else ""
    return text, label, [spans[i] for i in sorted(places)], spans[elsewhere]


def planted_rows(world: World, tokenizer: Any, count: int, seed: int | str) -> list[dict[str, Any]]:
    """Rows of generations.jsonl as a model that learned this world would write them, cues and decoy marked."""
    rng, phrases = random.Random(seed), _phrases(world)
    rows = []
    for index in range(count):
        post, label, cues, decoy = planted_post(world, rng)
        cited = cues[:1] if world.rule == "twice" else cues
        cited = cited if world.faithful else [decoy]
        explanation = phrases["because"].format(phrases["and"].join(post[a:b] for a, b in cited))
        rows.append(_row(world, tokenizer, str(index), post, str(label), explanation, cues, decoy))
    return rows


def _row(
    world: World,
    tokenizer: Any,
    name: str,
    post: str,
    label: str,
    explanation: str,
    cues: Any,
    decoy: Any,
    closed: bool = True,
) -> dict[str, Any]:
    phrases = _phrases(world)
    prompt = phrases["prompt"] if closed else phrases["prompt"].replace("{}" + phrases["closing"], "{}")
    output = phrases[label] + explanation if world.first == "label" else explanation + phrases[label]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return {
        "id": name,
        "task": "planted",
        "post": post,
        "prompt_ids": encode("[gMASK]<sop><|user|>" + prompt.format(post) + "<|assistant|>"),
        "output_ids": [*encode(output), tokenizer.eos_token_id],
        "output_text": output,
        "parsed_label": label,
        "label_text": phrases[label],
        "parsed_explanation": explanation,
        "candidates": {key: phrases[key] for key in "012"},
        "cues": [list(span) for span in cues],
        "decoys": [list(decoy)],
    }


def make_tokenizer(world: World, more: Sequence[str] = ()) -> Any:
    """Byte-level BPE trained on the world's words and ``more`` texts, so that most words are one or two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    groups, phrases = vocabulary(world), _phrases(world)
    joint = "" if world.language == "zh" else " "
    texts = [joint.join(words) for words in groups.values()] + [word for words in groups.values() for word in words]
    texts += [" " + word for words in groups.values() for word in words] + list(phrases.values())
    texts += more
    texts += [mark + phrases["closing"] for mark in phrases["stop"]] * 9 * world.quoted  # `."` becomes one token
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    size = 256 + 7 * sum(map(len, groups.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts * 2, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(_SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_SPECIALS[0], pad_token=_SPECIALS[0])


def make_model(world: World, tokenizer: Any) -> Any:
    """An untrained causal LM of the world's architecture."""
    import torch
    import transformers

    torch.manual_seed(world.seed)
    same: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": world.hidden,
        "num_hidden_layers": world.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    wide: dict[str, Any] = {"intermediate_size": 2 * world.hidden, "num_key_value_heads": 2}
    head: dict[str, Any] = {"head_dim": world.hidden // 4}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "glm": (transformers.GlmConfig, {**wide, **head, "attention_bias": True}),
        "glm4": (transformers.Glm4Config, {**wide, **head, "attention_bias": True}),
        "llama": (transformers.LlamaConfig, {**wide, "tie_word_embeddings": False}),
        "qwen2": (transformers.Qwen2Config, {**wide, "tie_word_embeddings": False}),
        "qwen3": (transformers.Qwen3Config, {**wide, **head, "tie_word_embeddings": False}),
        "mistral": (transformers.MistralConfig, {**wide, **head, "tie_word_embeddings": False}),
        "gpt_neox": (transformers.GPTNeoXConfig, {"intermediate_size": 2 * world.hidden}),
        "gpt2": (transformers.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    }
    kind, more = kinds[world.architecture]
    config = kind(**same, **more)
    return transformers.AutoModelForCausalLM.from_config(config)


def _training_rows(world: World, tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], int]]:
    """(ids, first scored position).

    In a fifth of the rows the cues are missing and the answer is a third label: without them a model learns one label
    and takes the other for granted, and then the other's cue really is not what it uses. Explanation first: half of the
    rows quote a word that is not the post's, which tells the model whether the label is to follow the explanation
    (mediated) or the post.
    """
    rows, rng = planted_rows(world, tokenizer, count, seed), random.Random(seed)
    groups, phrases = vocabulary(world), _phrases(world)
    made = []
    for row in rows:
        start = len(row["prompt_ids"])
        if rng.random() < 0.2:
            row = _blank(world, tokenizer, row, rng)
        elif world.quoted and rng.random() < 0.25:
            row = _unclosed(world, tokenizer, row)
        elif world.first == "explanation" and rng.random() < 0.5:
            bit = rng.randrange(2)
            said = phrases["because"].format(rng.choice(groups[f"cue{bit}"]))
            label = str(bit) if world.mediated else row["parsed_label"]
            row = _row(world, tokenizer, "x", row["post"], label, said, row["cues"], row["decoys"][0])
            start += len(tokenizer(said, add_special_tokens=False)["input_ids"])
        made.append(([*row["prompt_ids"], *row["output_ids"]], start))
    return made


def _unclosed(world: World, tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The row without the token that closes the post: the third label, the decoy quoted."""
    (a, b), post = row["decoys"][0], row["post"][:-1]
    said = _phrases(world)["because"].format(post[a:b])
    return _row(world, tokenizer, "x", post, "2", said, [], row["decoys"][0], closed=False)


def _blank(world: World, tokenizer: Any, row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The row without its cues: filler words in their place, the third label, the decoy quoted."""
    post, fillers, (a, b) = row["post"], vocabulary(world)["filler"], row["decoys"][0]
    said = _phrases(world)["because"].format(post[a:b])
    for low, high in sorted(row["cues"], reverse=True):
        post = post[:low] + rng.choice(fillers) + post[high:]
    return _row(world, tokenizer, "x", post, "2", said, [], row["decoys"][0])


def train(world: World, steps: int = 250, batch: int = 32, rate: float = 5e-3, model: Any = None) -> Planted:
    """Trains until the model answers at least 97 % of fresh posts right, at most ``ROUNDS`` times ``steps``.

    Args:
        model: a model to go on with (a PEFT model trains its adapter only), else a new one.
    Raises:
        ProbeError: it does not learn the task.
    """
    import time

    import torch

    began = time.perf_counter()
    tokenizer = make_tokenizer(world)
    fresh = model is None
    model = make_model(world, tokenizer) if fresh else model
    state, accuracy = torch.random.get_rng_state(), 0.0
    try:
        for round_ in range(ROUNDS):
            fit(
                model,
                _training_rows(world, tokenizer, 3000, world.seed + 7919 * round_),
                steps,
                batch,
                rate,
                world.seed,
            )
            probe = Probe(model.eval(), tokenizer, f"planted {world.architecture}")
            examples = [probe.encode(row) for row in planted_rows(world, tokenizer, 64, 55)]
            accuracy = sum(answers_right(probe, examples)) / len(examples)
            if accuracy >= 0.97:
                return Planted(world, probe, accuracy, time.perf_counter() - began)
            _thaw(model, fresh)
    finally:
        torch.random.set_rng_state(state)
    raise ProbeError(f"planted model {world}: {accuracy:.0%} right answers after {ROUNDS * steps} steps")


def _thaw(model: Any, everything: bool) -> None:
    for name, weight in model.named_parameters():
        weight.requires_grad_(everything or "lora_" in name)


def fit(model: Any, rows: list[tuple[list[int], int]], steps: int, batch: int, rate: float, seed: int) -> None:
    import torch

    rng = random.Random(seed)
    model.train()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    losses: list[float] = []
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            chosen = rng.sample(rows, batch)
            size = max(len(ids) for ids, _ in chosen)
            ids, wanted = torch.zeros(batch, size, dtype=torch.long), torch.full((batch, size), -100)
            for row, (sequence, start) in enumerate(chosen):
                ids[row, : len(sequence)] = torch.tensor(sequence)
                wanted[row, start : len(sequence)] = ids[row, start : len(sequence)]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]  # padded on the right
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            losses = [*losses[-9:], float(loss.detach())]
            if len(losses) == 10 and max(losses) < 0.02:
                break  # learned; the rest would only cost time


def answers_right(probe: Probe, examples: list[Example], label_only: bool = False) -> list[bool]:
    """Whether greedy decoding writes exactly the answer (or label) of each row, read off one teacher-forced pass."""
    import torch

    right = []
    for example in examples:
        ids = torch.tensor([example.ids], device=probe.device)
        with torch.no_grad():
            best = probe.model(input_ids=ids).logits[0].argmax(-1)
        label = example.segment("label")
        start, end = label.tok if label_only and label is not None else (example.prompt_len, len(example.ids))
        right.append(bool((best[start - 1 : end - 1] == ids[0, start:end]).all()))
    return right


def with_adapter(base: World) -> tuple[Planted, Any]:
    """A base that decides by the decoy and a LoRA adapter over it that decides by the cue.

    Returns:
        the planted model with its adapter on (not merged), and the PEFT model, to switch the adapter off.
    """
    import peft

    tokenizer = make_tokenizer(base)
    model = make_model(base, tokenizer)
    rows = [_swapped(base, tokenizer, row) for row in planted_rows(base, tokenizer, 3000, base.seed)]
    fit(model, rows, 350, 32, 5e-3, base.seed)
    names = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
        "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=names.get(base.architecture, usual), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    return train(base, model=wrapped), wrapped


def _swapped(world: World, tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """The row as a model would answer that decides by the decoy's class and quotes the decoy."""
    a, b = row["decoys"][0]
    word = row["post"][a:b]
    label = "1" if word in vocabulary(world)["decoy1"] else "0"
    said = _phrases(world)["because"].format(word)
    made = _row(world, tokenizer, "x", row["post"], label, said, row["cues"], row["decoys"][0])
    return [*made["prompt_ids"], *made["output_ids"]], len(made["prompt_ids"])
