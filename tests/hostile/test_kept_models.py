"""Models that `probes leaderboard` keeps: swapped, edited, of another world, or beside somebody's own files."""

import json
import shutil
from types import SimpleNamespace

import pytest

from probes.errors import ProbeInputError, ProbeWarning
from probes.probe import Probe
from probes.results.cache import Cache
from probes.validation.pairs import _NOTE, _kept
from probes.validation.planted import World
from tests.hostile.probes_files import clean, edit  # noqa: F401
from tests.hostile.world import contents

WORLD = World(seed=1)


@pytest.fixture
def kept(clean, tmp_path):  # noqa: F811
    """Two kept models, what trains one anew, and how often that was asked for."""
    made: list[str] = []

    def train(name: str = "again"):
        made.append(name)
        probe = Probe.from_pretrained(clean / "model")
        probe.model.lm_head.weight.data += 0.01 * len(made)
        return SimpleNamespace(probe=probe)

    for name in ("true", "false"):
        _kept(tmp_path, name, WORLD, lambda n=name: train(n))
    assert made == ["true", "false"]
    return tmp_path / "models", train, made


def read(kept, name: str = "true", world: World = WORLD) -> Probe:
    models, train, _ = kept
    return _kept(models.parent, name, world, train)


def test_a_sound_one_is_read_and_not_trained(kept):
    assert read(kept).fingerprint == json.loads((kept[0] / "true" / _NOTE).read_text())["model"]
    assert kept[2] == ["true", "false"]


def exchanged(models):
    (models / "true").rename(models / "x")
    (models / "false").rename(models / "true")
    (models / "x").rename(models / "false")


SWAPS = {
    "the two models": exchanged,
    "weights": lambda m: shutil.copy(m / "false" / "model.safetensors", m / "true" / "model.safetensors"),
    "its sizes": lambda m: edit(m / "true" / "config.json", rms_norm_eps=0.5),
    "its tokenizer": lambda m: edit(m / "true" / "tokenizer_config.json", pad_token="<|user|>"),
    "no note": lambda m: (m / "true" / _NOTE).unlink(),
    "a note of nothing": lambda m: (m / "true" / _NOTE).write_text("{}"),
    "a damaged note": lambda m: (m / "true" / _NOTE).write_text("["),
    "half a model": lambda m: (m / "true" / "model.safetensors").write_bytes(b"x"),
}  # fmt: skip


@pytest.mark.parametrize("swap", SWAPS)
def test_what_is_no_longer_the_model_that_was_trained(kept, swap):
    SWAPS[swap](kept[0])
    with pytest.warns(ProbeWarning, match="true.*trained again"):
        read(kept)
    assert kept[2] == ["true", "false", "again"]
    read(kept)
    assert len(kept[2]) == 3  # once


def test_a_model_of_another_world_with_the_same_seed(kept):
    with pytest.warns(ProbeWarning, match="is not the model that this version trained for this world; trained again"):
        read(kept, world=World(seed=1, decoy=0.9))


def test_files_of_somebody_beside_half_a_model_stay(kept):
    place = kept[0] / "true"
    (place / "notes.txt").write_text("mine")
    (place / "model.safetensors").write_bytes(b"x")
    before = contents(place)
    with pytest.raises(ProbeInputError, match=r"it would be replaced, but holds notes\.txt; give another --out"):
        read(kept)
    assert contents(place) == before and kept[2] == ["true", "false"]


@pytest.mark.parametrize("where", ["models", "models/true"])
def test_a_link_in_place_of_models(kept, where):
    elsewhere = kept[0].parent / "elsewhere"
    place = kept[0].parent / where
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(ProbeInputError, match=rf"{where}: is a link; models are kept, and replaced, in --out itself"):
        read(kept)
    assert contents(elsewhere) == before


def test_a_link_in_place_of_a_model_that_is_not_finished(kept):
    """What was trained went where it led."""
    models, elsewhere = kept[0], kept[0].parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("somebody's model")
    (models / ".true.unfinished").symlink_to(elsewhere)
    (models / "true" / _NOTE).unlink()
    before = contents(elsewhere)
    with pytest.raises(
        ProbeInputError, match=r"\.true\.unfinished: is a link; models are kept, and replaced, in --out"
    ):
        read(kept)
    assert contents(elsewhere) == before


def test_a_link_in_place_of_results(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProbeInputError, match="cache: is a link, and would be written through; remove it"):
        Cache(tmp_path)
