"""Layers laid apart for decoding; what is decoded is compared with transformers in test_generate.py."""

import jax
import numpy as np
from flax import nnx

from mentalglm_jax.inference import decode
from mentalglm_jax.inference.decode import generate_ids, laid_apart


def test_layers_too_large_to_lie_apart_stay_in_their_stack(hf, monkeypatch):
    """All tests of test_generate.py decode with layers laid apart, as a CPU does when they fit twice."""
    model = hf.to_jax(hf.variant("glm4"))
    state = nnx.split(model)[1]
    apart = laid_apart(state)
    assert apart is not None
    assert len(apart) == 3
    for layer, parameters in enumerate(apart):
        jax.tree.map(lambda x, y, n=layer: np.testing.assert_array_equal(x[n], y), state["layers"], parameters)
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    expected = generate_ids(model, prompts, max_new_tokens=10, eos_ids=[1])
    size = sum(x.nbytes for x in jax.tree.leaves(state["layers"]))
    monkeypatch.setattr(decode, "free_memory", lambda device: 4 * size - 1)
    assert laid_apart(state) is None
    assert generate_ids(model, prompts, max_new_tokens=10, eos_ids=[1]) == expected
    for free in (4 * size, None):  # None: a system that does not say
        monkeypatch.setattr(decode, "free_memory", lambda device, free=free: free)
        assert laid_apart(state) is not None
