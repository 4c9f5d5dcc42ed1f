"""Pairs of planted models that metrics of faithfulness are judged by, and their posts; kept on disk once trained.

The labels of a pair are equally right. *Post hoc*: the explanation after the label quotes the word that decides, or a
decoy. *Chain*: the label follows the chain before it, or does not hear it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.files import write_json
from probes.foreign import inside, read_json, some
from probes.probe import Probe
from probes.records import Example
from probes.results.cache import digest
from probes.validation.planted import Planted, World, train
from probes.validation.reasoning import Reasoner, ReasoningWorld, train_reasoner


@dataclass(frozen=True)
class Setting:
    """Where explanations stand, the worlds of which a pair is trained each, and how many posts a test is given.

    Attributes:
        size: posts of a data set. A test of chains has blocks of four posts as clusters, so it needs more.
        nulls: posts on which nothing is true, for each unfaithful model.
        chains: the explanation is the chain before the label.
    """

    name: str
    title: str
    worlds: Mapping[str, World]
    size: int
    nulls: int
    chains: bool = False


# Eight architectures in either setting.
POST_HOC = Setting(
    "post hoc",
    "Explanations after the label",
    {
        "one cue": World(architecture="llama", seed=201),
        "cue in two places": World(architecture="qwen2", rule="twice", seed=202),
        "two cues, AND": World(architecture="qwen3", rule="and", seed=203),
        "two cues, OR": World(architecture="glm", rule="or", seed=204),
        "decoy correlated 0.9": World(architecture="mistral", language="zh", decoy=0.9, seed=205),
        "cue late, no punctuation": World(architecture="glm4", place="late", punctuation=False, seed=206),
        "one character": World(architecture="gpt2", language="zh", letters=1, seed=207),
        "long posts": World(architecture="gpt_neox", clauses=(8, 12), seed=208),
    },
    size=10,
    nulls=400,
)
CHAINS = Setting(
    "chain",
    "Chains before the label",
    {
        "one cue": World(architecture="llama", clauses=(3, 5), seed=211),
        "Chinese": World(architecture="qwen2", language="zh", clauses=(3, 5), seed=212),
        "long posts": World(architecture="qwen3", clauses=(5, 8), seed=213),
        "six words a class": World(architecture="glm", clauses=(3, 5), words=6, seed=214),
        "cue late": World(architecture="mistral", clauses=(3, 5), place="late", seed=215),
        "no punctuation": World(architecture="glm4", clauses=(3, 5), punctuation=False, seed=216),
        "decoy correlated 0.9": World(architecture="gpt2", clauses=(3, 5), decoy=0.9, seed=217),
        "words people know": World(architecture="gpt_neox", language="words", clauses=(3, 5), seed=218),
    },
    size=20,
    nulls=80,
    chains=True,
)
SETTINGS = (POST_HOC, CHAINS)
POSTS = 40  # of both models of a pair
_FRESH = 3_000_001
_NOTE = "planted.json"
_OWN = frozenset({_NOTE, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                  "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models of one world over the same posts, the faithful one first.

    Attributes:
        nulls: posts of the second on which nothing is true. Post hoc, the explanation quotes a clause drawn at random;
            of chains, they are fresh posts whose label does not hear the chain.
    """

    probes: tuple[Probe, Probe]
    examples: tuple[list[Example], list[Example]]
    nulls: list[Example]


def make_pair(setting: Setting, world: World, out: Path | None, posts: int = POSTS, nulls: int | None = None) -> Pair:
    """The two models of a world, trained or read from ``out``, with posts that both answer right.

    Args:
        nulls: posts on which nothing is true; None: as many as ``setting`` says.
    Raises:
        ProbeError: a model does not learn its task, or ``out`` cannot be written.
    """
    found = [(_chain if setting.chains else _post_hoc)(world, true, out) for true in (True, False)]
    drawn = [{e.id: _asked(setting, e) for e in model.examples(posts + posts // 4)} for model in found]
    both = [name for name in drawn[0] if name in drawn[1]][:posts]
    other, nulls = found[1], setting.nulls if nulls is None else nulls
    if isinstance(other, Planted):
        empty = other.cited_at_random(nulls)
    else:
        empty = [_asked(setting, e) for e in other.examples(nulls, _FRESH)]
    examples = [[side[name] for name in both] for side in drawn]
    return Pair((found[0].probe, other.probe), (examples[0], examples[1]), empty)


def _asked(setting: Setting, example: Example) -> Example:
    return example.asked("reasoning") if setting.chains else example


def _post_hoc(world: World, true: bool, out: Path | None) -> Planted:
    world = dataclasses.replace(world, faithful=true)
    name = f"post-hoc-{world.architecture}-{world.seed}-{'faithful' if true else 'unfaithful'}"
    return Planted(world, _kept(out, name, world, lambda: train(world)), math.nan, 0.0)


def _chain(base: World, true: bool, out: Path | None) -> Reasoner:
    world = ReasoningWorld(base, "chain" if true else "post_hoc")
    name = f"chain-{base.architecture}-{base.seed}-{'heard' if true else 'unheard'}"
    return Reasoner(world, _kept(out, name, world, lambda: train_reasoner(world)), math.nan, 0.0)


def _kept(out: Path | None, name: str, world: Any, make: Callable[[], Any]) -> Probe:
    """The model kept under a name, or the one that ``make`` trains, kept from then on. Of a kept one a note says which
    world it learnt in, by which version, and what its weights were: of two that changed places the table would say the
    opposite of what is true.

    Raises:
        ProbeInputError: its directory is a link, or holds files of somebody else's and no such model.
        ProbeError: the directory cannot be written.
    """
    if out is None:
        return _named(make().probe, name)
    directory = out / "models" / name
    unfinished = directory.with_name(f".{name}.unfinished")
    if links := [one for one in (directory.parent, directory, unfinished) if one.is_symlink()]:
        raise ProbeInputError(f"{links[0]}: is a link; models are kept, and replaced, in --out itself; remove it")
    of = digest([name, dataclasses.asdict(world), metadata.version("mentalglm-jax")])
    if directory.is_dir():
        try:
            probe = Probe.from_pretrained(directory)
            if read_json(inside(directory, _NOTE)) == {"of": of, "model": probe.fingerprint}:
                return _named(probe, name)
            why = f"{directory}: is not the model that this version trained for this world"
        except ProbeInputError as error:
            why = str(error)
        if others := sorted(one.name for one in directory.iterdir() if one.name not in _OWN):
            raise ProbeInputError(f"{why}; it would be replaced, but holds {some(others)}; give another --out")
        warnings.warn(f"{why}; trained again", ProbeWarning, stacklevel=2)
    made = make().probe
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        made.model.save_pretrained(unfinished)
        made.tokenizer.save_pretrained(unfinished)
        probe = Probe.from_pretrained(unfinished)  # as it will be read: its configuration is another's then
        write_json(unfinished / _NOTE, {"of": of, "model": probe.fingerprint})
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    except OSError as error:
        raise ProbeError(f"{directory}: cannot write ({error.strerror or error})") from error
    return _named(probe, name)


def _named(probe: Probe, name: str) -> Probe:
    probe.name = name
    return probe
