"""The chunked loss of packed rows against the plain definition: each conversation alone, full logits, log-softmax in
NumPy float64. The last test breaks the batch in the usual ways; each must be far outside the tolerance."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.batches import PackedBatches, encode_records
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, LoraParam, add_lora
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.loss import LossSums, answer_loss, chunked_scores, weighed
from mentalglm_jax.train.step import make_optimizer, make_step
from tests.mentalglm_jax.tiny import VOCAB, tiny_batch, tiny_config, tiny_examples, tiny_model

ROWS, SLOTS = 2, 13


def chunked_sums(model, hidden, ids, weights, chunk, key=None) -> LossSums:
    return weighed(chunked_scores(model, hidden, ids, chunk, key), weights)


@pytest.fixture(scope="module")
def model() -> Glm:
    return tiny_model(dropout=0.5)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, SLOTS, 32)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SLOTS)), jnp.int32)
    weights = jnp.asarray(rng.choice([0, 1, 0.25], (ROWS, SLOTS)), jnp.float32)
    return hidden, ids, weights


@partial(jax.jit, static_argnums=0)
def all_logits(graph, state, tokens, segments):
    return nnx.merge(graph, state)(tokens, None, segments)


@partial(jax.jit, static_argnums=(0, 3))
def sums_of(graph, state, batch, chunk, key):
    return answer_loss(nnx.merge(graph, state), batch, chunk=chunk, key=key)


def alone(model: Glm, examples) -> tuple[float, float, float]:
    """(nll, correct, weight) of conversations, one by one, from full logits."""
    nll = correct = weight = 0.0
    longest = max(len(e["tokens"]) for e in examples)
    graph, state = nnx.split(model)
    for item in examples:
        length = len(item["tokens"])
        tokens, segments = np.zeros((1, longest), np.int32), np.zeros((1, longest), np.int32)
        tokens[0, :length], segments[0, :length] = item["tokens"], 1
        logits = np.asarray(all_logits(graph, state, tokens, segments), np.float64)[0]
        for index, target in zip(item["target_index"], item["target_ids"], strict=True):
            nll -= (
                logits[index, target] - np.log(np.exp(logits[index] - logits[index].max()).sum()) - logits[index].max()
            )
            correct += logits[index].argmax() == target
            weight += 1
    return nll, correct, weight


def loss_of(model: Glm, batch, key=None, chunk: int = 8) -> np.ndarray:
    return np.array(sums_of(*nnx.split(model), batch, chunk, key), np.float64)


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_chunked_equals_naive_with_its_gradient(model, inputs, chunk):
    hidden, ids, weights = inputs
    graph, state = nnx.split(model)

    def chunked(hidden, state):
        return chunked_sums(nnx.merge(graph, state), hidden, ids, weights, chunk).nll

    def naive(hidden, state):
        logits = nnx.merge(graph, state).unembed(hidden)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
        return -(chosen * weights).sum()

    found, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), allow_int=True))(hidden, state)
    wanted, reference = jax.jit(jax.value_and_grad(naive, argnums=(0, 1), allow_int=True))(hidden, state)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(1, float(jnp.abs(other).max())))
    assert float(jnp.abs(gradients[0]).max()) > 0.01  # there is something to compare


def test_sums_are_weighted(model, inputs):
    hidden, ids, weights = inputs
    logits = np.asarray(model.unembed(hidden), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(ids)[..., None], axis=-1)[..., 0]
    ids = jnp.where(jnp.arange(SLOTS) % 2 == 0, jnp.asarray(logits.argmax(axis=-1), jnp.int32), ids)  # half are right
    sums = chunked_sums(model, hidden, ids, weights, 5)
    nll = -np.take_along_axis(log_p, np.asarray(ids)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(float(sums.nll), (nll * np.asarray(weights)).sum(), rtol=1e-6)
    right = logits.argmax(axis=-1) == np.asarray(ids)
    assert float(sums.correct) == (right * np.asarray(weights)).sum() and 0 < float(sums.correct) < weights.sum()
    assert float(sums.weight) == weights.sum()
    # What a slot of weight 0 holds does not matter.
    other = chunked_sums(model, hidden, jnp.where(weights == 0, 1, ids), weights, 5)
    assert [float(x) for x in other] == [float(x) for x in sums]


def test_no_array_of_all_logits_exists(model):
    """Neither in the forward nor in the backward program; the largest one is of a chunk."""
    graph, train, frozen = nnx.split(model, LoraParam, ...)
    batch, vocab, chunk = tiny_batch(rows=8), 96, 4
    slots = batch["target_ids"].shape[1]
    assert slots >= 4 * chunk

    def loss(train):
        return answer_loss(nnx.merge(graph, train, frozen), batch, chunk=chunk).nll

    sizes = [0]

    def look(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars if v.aval.shape[-1:] == (vocab,) and v.aval.ndim > 2)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                look(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else None

    look(jax.make_jaxpr(jax.grad(loss))(train).jaxpr)
    assert max(sizes) == 8 * chunk * vocab


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_compiled_step_holds_no_array_of_all_logits(remat):
    """What XLA made of the whole training step: the largest array with the vocabulary in it is one chunk of logits or
    the projection itself, and the chunk is what the temporary memory grows with."""
    slots, chunk, rows, vocab = 64, 8, 4, 1999  # a prime: no other axis can be mistaken for the vocabulary
    geometry = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = GlmConfig(vocab_size=vocab, num_attention_heads=2, num_key_value_heads=1, **geometry)
    model = Glm(config, rngs=nnx.Rngs(0), remat=remat)
    add_lora(model, LoraConfig(rank=2), nnx.Rngs(1))
    tokens = np.zeros((1, rows, slots), np.int32)
    batch = {"tokens": tokens, "positions": tokens, "segment_ids": tokens + 1, "target_index": tokens,
             "target_ids": tokens, "target_weights": np.ones((1, rows, slots), np.float32)}  # fmt: skip

    def program(chunk: int):
        settings = tiny_config(loss_chunk=chunk)
        step, state, frozen = make_step(model, make_optimizer(settings, 12), settings, "lora")
        lowered = step.lower(state.trainable, state.optimizer, frozen, batch, jax.random.key(0))
        return lowered.compile({"xla_backend_optimization_level": 0})

    compiled = program(chunk)
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([0-9,]+)\]", compiled.as_text())}
    sizes = {int(np.prod(shape)) // vocab for shape in shapes if vocab in shape}
    assert sizes and max(sizes) == rows * chunk and rows * slots not in sizes
    whole = program(slots)  # one chunk: the naive loss
    saved = whole.memory_analysis().temp_size_in_bytes - compiled.memory_analysis().temp_size_in_bytes
    assert saved >= 0.9 * rows * (slots - chunk) * vocab * 4


def test_a_packed_row_is_the_sum_of_its_parts(model):
    examples = tiny_examples(12)
    batches = PackedBatches(examples, rows=8, sequence_length=48, targets_per_row=None, seed=0)
    assert batches.lengths.rows < 8 and batches.steps_per_epoch() == 1  # several per row, and rows left empty
    wanted = alone(model, examples)
    for chunk in (7, 1000):
        np.testing.assert_allclose(loss_of(model, next(iter(batches)), chunk=chunk), wanted, rtol=1e-6)
    assert 0 < wanted[1] < wanted[2]


def test_dropout_only_with_a_key(model):
    batch = tiny_batch()
    still = loss_of(model, batch)
    first, second = (loss_of(model, batch, key=jax.random.key(seed)) for seed in (0, 1))
    assert len({still[0], first[0], second[0]}) == 3
    assert loss_of(model, batch, key=jax.random.key(0))[0] == first[0]


def shift(batch):
    return batch | {"target_index": np.minimum(batch["target_index"] + 1, batch["tokens"].shape[1] - 1)}


def without_stop(batch):
    stop = batch["target_ids"] == GlmTokenizer.load(BUILTIN).stop_id
    assert stop.any()
    return batch | {"target_weights": np.where(stop, 0, batch["target_weights"]).astype(np.float32)}


def unweighted(batch):
    return batch | {"target_weights": np.ones_like(batch["target_weights"])}


def leaking(batch):
    return batch | {"segment_ids": np.minimum(batch["segment_ids"], 1)}


def running_positions(batch):
    """Positions that do not restart change nothing to rotary attention, which sees distances; scaled ones do."""
    return batch | {"positions": 2 * batch["positions"]}


def test_real_conversations_and_mutations():
    tokenizer = GlmTokenizer.load(BUILTIN)
    records = make_corpus(SyntheticConfig(n_train=1, n_dev=0, n_test=0, n_clauses=(4, 4)))[:6]
    examples, _ = encode_records(records, tokenizer, 256)
    geometry = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    model = Glm(GlmConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.2, **geometry), rngs=nnx.Rngs(0))
    wanted = alone(model, examples)
    batches = PackedBatches(examples, rows=4, sequence_length=320, targets_per_row=None, seed=0)
    batch = next(iter(batches))
    assert batches.steps_per_epoch() == 1 and batch["segment_ids"].max() > 1
    np.testing.assert_allclose(loss_of(model, batch), wanted, rtol=1e-6)
    for mutation in (shift, without_stop, unweighted, leaking, running_positions):
        assert abs(loss_of(model, mutation(batch))[0] / wanted[0] - 1) > 1e-4, mutation.__name__


def test_dropout_reaches_an_adapter_on_lm_head(inputs):
    """A mask per chunk, the same in the backward pass, where the projection is computed again."""
    model = tiny_model(lora=False)
    add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.5, target_modules=("lm_head",)), nnx.Rngs(1))
    head = model.lm_head.adapter
    head.b.set_value(0.1 * jax.random.normal(jax.random.key(2), head.b.shape))
    graph, adapter, rest = nnx.split(model, LoraParam, ...)

    @jax.jit
    def batch_loss(key):
        return answer_loss(nnx.merge(graph, adapter, rest), tiny_batch(), chunk=8, key=key).nll

    found = {float(batch_loss(key)) for key in (None, jax.random.key(1), jax.random.key(2), jax.random.key(1))}
    assert len(found) == 3

    hidden, ids, weights = inputs
    hidden, ids = (jnp.broadcast_to(x[:1, :1], x.shape) for x in (hidden, ids))  # every slot the same

    @jax.jit
    def one_chunk(slot):
        only = jnp.zeros_like(weights).at[0, slot].set(1)
        return chunked_sums(nnx.merge(graph, adapter, rest), hidden, ids, only, 1, jax.random.key(3)).nll

    assert len({float(one_chunk(slot)) for slot in range(4)}) == 4

    @jax.jit
    def loss(adapter):
        return chunked_sums(nnx.merge(graph, adapter, rest), *inputs, 4, jax.random.key(3)).nll

    slopes = jax.grad(loss)(adapter)
    moved = [float(loss(jax.tree.map(lambda w, g, way=way: w + way * g, adapter, slopes))) for way in (1e-4, -1e-4)]
    squared = sum(float((g * g).sum()) for g in jax.tree.leaves(slopes))
    assert (moved[0] - moved[1]) / 2e-4 == pytest.approx(squared, rel=5e-3)
