"""Chips and slices: names in, figures out, one line for a name that is none."""

import re

import pytest

from mentalglm_jax.devices.hardware import GPUS, TPUS, chip_of, parse_topology
from mentalglm_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "name", "devices", "hosts"),
    [
        ("v5e:2x4", "v5e:2x4", 8, (2, 4, 1)),
        ("v5e-8", "v5e:2x4", 8, (2, 4, 1)),
        ("v5litepod-16", "v5e:4x4", 16, (2, 2, 1)),
        ("V6E-1", "v6e:1x1", 1, (1, 1, 1)),
        ("v5p-8", "v5p:2x2x1", 4, (2, 2, 1)),  # eight cores are four chips, and JAX sees a chip as one device
        ("v4:2x2x2", "v4:2x2x2", 8, (2, 2, 1)),
        ("7x:2x2x1", "tpu7x:2x2x1", 8, (2, 2, 1)),  # here it sees two
    ],
)
def test_slices(text, name, devices, hosts):
    found = parse_topology(text)
    assert (found.name, found.devices, found.hosts) == (name, devices, hosts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v9:2x2", "not known; write CHIP:SHAPE"),
        ("v5e", "not known; write CHIP:SHAPE"),
        ("v5e-7", "'v5e-7' is not one of v5e-1, v5e-4, v5e-8"),
        ("v5p-4", "'v5p-4' is not one of v5p-8, v5p-16"),
        ("v5e:2x2x1", "a v5e slice has two sides, e.g. 2x4"),
        ("v5p:2x2", "a v5p slice has three sides, e.g. 2x2x1"),
        ("v5e:0x4", "two sides"),
    ],
)
def test_a_slice_that_is_none_is_refused(text, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        parse_topology(text)


def test_what_jax_calls_a_device():
    names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4",
             "TPU7x": "tpu7x", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}  # fmt: skip
    assert {kind: chip.name for kind in names if (chip := chip_of(kind))} == names
    assert chip_of("cpu") is None


def test_figures_have_a_source_and_the_order_of_generations():
    assert all(chip.source.startswith("https://") for chip in (*TPUS.values(), *GPUS))
    # One machine's balance: FLOPs per byte of memory traffic lie between 140 (A100) and 620 (v6e) on all of them.
    assert all(140 < chip.flops / chip.bandwidth < 620 for chip in (*TPUS.values(), *GPUS))
