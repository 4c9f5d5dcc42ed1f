"""BERTScore: hidden states against transformers, scores by their definition, and directories that are not BERT."""

import json

import numpy as np
import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.bertscore import Encoder, bert_score, reference_bert_score
from mentalglm_jax.text import tasks

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"我很难过开心睡不着的人", "tired", "sad", "##ly"]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A random two-layer BERT as transformers saves it, and the model itself."""
    import torch
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=40, initializer_range=0.5)  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return directory, model


@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_states_are_those_of_transformers(oracle, layer):
    import torch

    directory, model = oracle
    encoder = Encoder(directory, layer=layer)
    ids = encoder.tokens("我很难过 Sadly")
    assert [WORDS[i] for i in ids] == ["[CLS]", "我", "很", "难", "过", "sad", "##ly", "[SEP]"]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, 1:-1].numpy()
    expected = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    np.testing.assert_allclose(encoder(ids), expected, atol=2e-5)


def test_scores_are_greedy_matches(oracle):
    encoder = Encoder(oracle[0])
    reference, said = "我很难过", "睡不着的人"
    left, right = (encoder(encoder.tokens(text)) for text in (reference, said))
    recall = np.mean([max(float(a @ b) for b in right) for a in left])
    precision = np.mean([max(float(a @ b) for a in left) for b in right])
    found = bert_score(encoder, [(reference, said)])
    assert found["precision"] == pytest.approx(precision, abs=1e-6)
    assert found["recall"] == pytest.approx(recall, abs=1e-6)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert bert_score(encoder, [(reference, reference)])["f1"] == pytest.approx(1, abs=1e-5)
    assert bert_score(encoder, [(reference, reference), (reference, "")])["f1"] == pytest.approx(0.5, abs=1e-5)
    long = "我" * 300
    assert len(encoder.tokens(long)) == 40
    assert bert_score(encoder, [(long, long)])["f1"] == pytest.approx(1, abs=1e-5)


def test_answers_are_scored_per_language(oracle):
    def answer(number, language, explanation, reference):
        question = tasks.TASKS["suicide_risk"].question(language)
        record = Record(f"r{number}", "suicide_risk", language, "p", question, "high", explanation=reference)
        return Answer(record, ("high",), explanation, "ok")

    said = [answer(0, "zh", "我很难过", "我很难过"), answer(1, "zh", None, "睡不着"), answer(2, "en", "sad", None)]
    found = reference_bert_score(Encoder(oracle[0]), said)
    assert set(found) == {"zh"}
    assert found["zh"]["f1"] == pytest.approx(0.5, abs=1e-5)


def test_what_is_no_bert_is_named(oracle, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((oracle[0] / name).read_bytes())
    with pytest.raises(InputError, match=r"neither tokenizer.json nor vocab.txt"):
        Encoder(tmp_path)
    with pytest.raises(InputError, match="has layers 1 to 2, not 3"):
        Encoder(oracle[0], layer=3)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bart"}), encoding="utf-8")
    with pytest.raises(InputError, match="model_type 'bart'"):
        Encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="damaged"):
        Encoder(tmp_path)
    with pytest.raises(InputError, match="not a BERT directory"):
        Encoder(tmp_path / "absent")
