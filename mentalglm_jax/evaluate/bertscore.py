"""BERTScore with a local BERT encoder (Zhang et al. 2020, arXiv 1904.09675), computed in JAX.

For a BERT directory the user has (bert-base-chinese, Chinese-MentalBERT, RoBERTa-wwm, ...): ``config.json``,
``model.safetensors`` and ``tokenizer.json`` or ``vocab.txt``. No idf weights, no rescaling by a baseline; [CLS] and
[SEP] match nothing.
"""

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mentalglm_jax.checkpoints.hf_files import DTYPES, TensorFiles
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.foreign import Fields, first_line, inside, read_json, read_text, there
from mentalglm_jax.text.tokenizer_files import SwitchedOffWarning
from mentalglm_jax.text.tokenizer_files import read_tokenizer as read_tokenizer_json

LENGTHS = (64, 128, 256, 512)
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Encoder:
    """A BERT encoder, float32.

    Args:
        directory: a Hugging Face BERT directory.
        layer: whose output is compared, counted from 1; None is the last. (bert-score's own table uses 9 of 12 for
            English BERT and 8 for bert-base-chinese.)

    Raises:
        InputError: a file is missing or damaged, another architecture, or no such layer.
    """

    def __init__(self, directory: str | Path, layer: int | None = None):
        directory = Path(directory)
        config, self._tensors = read_model(directory, "bert", "hidden_act")
        read = Fields(config, str(directory / "config.json"))
        layers = read.integer("num_hidden_layers", 1, 1000)
        if layer is not None and not 1 <= layer <= layers:
            raise InputError(f"{directory}: has layers 1 to {layers}, not {layer}")
        self.layers, self._heads = layer or layers, read.integer("num_attention_heads", 1, 1 << 16)
        self._eps = read.number("layer_norm_eps", 0.0, 1.0, 1e-12)
        self._longest = min(read.integer("max_position_embeddings", 2, 1 << 31), LENGTHS[-1])
        self._tokenizer = read_tokenizer(directory, self._longest)
        words, places = (f"embeddings.{part}_embeddings.weight" for part in ("word", "position"))
        rows = {words: rows_for(self._tokenizer), places: self._longest}
        check_shapes(directory, self._tensors, _wanted(self.layers), words, rows, self._heads)

    def tokens(self, text: str) -> list[int]:
        """Ids of [CLS] text [SEP], cut to the encoder's longest input."""
        return list(self._tokenizer.encode(text).ids)

    def __call__(self, ids: Sequence[int]) -> Float[np.ndarray, "T D"]:
        """Unit vectors of the tokens between [CLS] and [SEP]."""
        size = next(length for length in LENGTHS if length >= min(len(ids), self._longest))
        size = min(size, self._longest)
        padded = np.zeros(size, np.int32)
        padded[: len(ids)] = ids
        used = {name: self._tensors[name] for name in _wanted(self.layers)}
        hidden = _encode(used, padded, np.int32(len(ids)), layers=self.layers, heads=self._heads, eps=self._eps)
        vectors = np.asarray(hidden)[1 : len(ids) - 1]
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def bert_score(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean precision, recall and F1 over (reference, explanation) pairs; an empty text scores 0.

    Every token of the explanation is matched with the reference's most similar one (precision), and the other way
    round (recall); similarity is the cosine.
    """
    rows = []
    for reference, said in pairs:
        left, right = (
            encoder(encoder.tokens(text)) if text.strip() else np.zeros((0, 1)) for text in (reference, said)
        )
        if not len(left) or not len(right):
            rows.append((0.0, 0.0, 0.0))
            continue
        similar = right @ left.T
        precision, recall = float(similar.max(axis=1).mean()), float(similar.max(axis=0).mean())
        rows.append((precision, recall, 2 * precision * recall / (precision + recall)))
    means = np.mean(rows, axis=0) if rows else np.zeros(3)
    return dict(zip(("precision", "recall", "f1"), map(float, means), strict=True))


def reference_bert_score(encoder: Encoder, answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """``bert_score`` per language over all answers whose record has a reference explanation."""
    found = {}
    for language in sorted({answer.record.language for answer in answers}):
        pairs = [
            (a.record.explanation, a.explanation or "") for a in answers
            if a.record.language == language and a.record.explanation is not None
        ]  # fmt: skip
        if pairs:
            found[language] = bert_score(encoder, pairs)
    return found


def read_model(directory: Path, kind: str, activation: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration and float32 tensors of a Hugging Face directory.

    Args:
        kind: the ``model_type`` it must have.
        activation: the key of the configuration that must say gelu, its default.

    Raises:
        InputError: a file is missing or damaged, or another architecture.
    """
    name = kind.upper()
    try:
        config = read_json(directory / "config.json")
        file = inside(directory, "model.safetensors")
    except InputError as error:
        raise InputError(f"{directory}: not a {name} directory ({error}); it needs config.json, model.safetensors "
                         "and tokenizer.json or vocab.txt") from None  # fmt: skip
    try:
        tensors = read_tensors(file)
    except InputError as error:
        raise InputError(f"{directory}: damaged ({error})") from None
    found, function = config.get("model_type"), config.get(activation, "gelu")
    if (found, function) != (kind, "gelu"):
        raise InputError(f"{directory}: model_type {found!r} with {activation} {function!r}; {name}Score here needs a "
                         f"{name} with gelu")  # fmt: skip
    return config, tensors


def read_tensors(path: Path) -> dict[str, Array]:
    """float32 tensors by their newest names. Raises: InputError if the file is damaged or holds NaN."""
    files, found = TensorFiles([path]), {}
    for stored, info in files.tensors.items():
        if info.dtype not in DTYPES:  # position ids, which are no weights
            continue
        name = re.sub(r"^bert\.", "", stored)
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        value = files.read(stored).astype(np.float32)
        if not np.isfinite(value).all():
            raise InputError(f"{path}: NaN or infinity in {stored}")
        found[name] = jnp.asarray(value)
    return found


def check_shapes(
    directory: Path, tensors: Mapping[str, Array], names: Sequence[str], words: str, rows: Mapping[str, int], heads: int
) -> None:
    """Whether the tensors ``names`` are there and fit one another.

    Args:
        words: the embedding of tokens, whose width is the model's.
        rows: how many rows an embedding needs at least.

    Raises:
        InputError: names a tensor that is missing or of the wrong shape.
    """
    file = directory / "model.safetensors"
    if missing := [name for name in (words, *names) if name not in tensors]:
        raise InputError(f"{file}: tensor {missing[0]!r} is missing")
    width = tensors[words].shape[-1]
    if width % heads:
        raise InputError(f"{directory / 'config.json'}: {heads} attention heads do not divide a width of {width}")
    for name in dict.fromkeys([words, *names]):
        shape, kind = tensors[name].shape, name.rpartition(".")[2]
        of = name.removesuffix(f".{kind}")
        if name == words or ("embed" in name and "norm" not in name.lower()):
            good = len(shape) == 2 and shape[1] == width and shape[0] >= rows.get(name, 1)
        elif kind == "bias":
            good = shape == tensors[f"{of}.weight"].shape[:1]
        elif "norm" in name.lower():
            good = shape == (width,)
        elif of.endswith(("intermediate.dense", "fc1")):
            good = len(shape) == 2 and shape[1] == width
        elif of.endswith("fc2") or (of.endswith("output.dense") and "attention" not in of):
            into = of.replace("fc2", "fc1").replace("output.dense", "intermediate.dense")
            good = shape == (width, *tensors[f"{into}.weight"].shape[:1])
        else:
            good = shape == (width, width)
        if not good:
            raise InputError(f"{file}: tensor {name!r} of shape {list(shape)} does not fit the others")


def read_tokenizer(directory: Path, longest: int) -> Any:
    """The tokenizer of ``tokenizer.json``, else of ``vocab.txt``, cutting at ``longest``. Raises: InputError."""
    from tokenizers import BertWordPieceTokenizer

    fast, words, said = directory / "tokenizer.json", directory / "vocab.txt", directory / "tokenizer_config.json"
    if there(fast):
        with warnings.catch_warnings():  # it is cut here too, at the length that the model has
            warnings.simplefilter("ignore", SwitchedOffWarning)
            tokenizer: Any = read_tokenizer_json(fast)
    elif there(words):
        options = Fields(read_json(said) if there(said) else {}, str(said))
        lines = read_text(inside(directory, words.name)).split("\n")
        vocabulary = {line.rstrip(): number for number, line in enumerate(lines) if line.strip()}
        try:
            tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=options.flag("do_lower_case", True))
        except Exception as error:  # the library's bare one
            raise InputError(f"{words}: not the words of a BERT tokenizer ({first_line(error)})") from None
    else:
        raise InputError(f"{directory}: has neither tokenizer.json nor vocab.txt")
    tokenizer.enable_truncation(longest)
    return tokenizer


def rows_for(tokenizer: Any) -> int:
    """How many rows an embedding needs: ids count the lines of vocab.txt, also those that are blank or stand twice, and
    JAX would read one beyond the embedding as its last."""
    return max(tokenizer.get_vocab().values(), default=0) + 1


def _wanted(layers: int) -> list[str]:
    names = [
        f"embeddings.{part}.weight" for part in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    parts = ["embeddings.LayerNorm"]
    for number in range(layers):
        parts += [f"encoder.layer.{number}.{part}" for part in _LAYER]
    return names + [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


_LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
          "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")  # fmt: skip


@functools.partial(jax.jit, static_argnames=("layers", "heads", "eps"))
def _encode(
    tensors: Mapping[str, Array], ids: Int[Array, " S"], length: Int[Array, ""], *, layers: int, heads: int, eps: float
) -> Float[Array, "S D"]:
    """Hidden states after ``layers`` layers; positions from ``length`` on are padding."""

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def dense(x: Array, name: str) -> Array:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    size = ids.shape[0]
    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + tensors["embeddings.position_embeddings.weight"][:size], "embeddings.LayerNorm")
    hidden = jnp.where(jnp.arange(size) < length, 0.0, -jnp.inf)
    for number in range(layers):
        at = f"encoder.layer.{number}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{part}").reshape(size, heads, -1) for part in ("query", "key", "value")
        )
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + hidden
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v).reshape(size, -1)
        x = norm(x + dense(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        wide = jax.nn.gelu(dense(x, f"{at}.intermediate.dense"), approximate=False)
        x = norm(x + dense(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x
