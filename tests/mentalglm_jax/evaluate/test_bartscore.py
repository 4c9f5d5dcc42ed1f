"""BARTScore: the log-probability against transformers, what is averaged, and directories that are no BART."""

import json

import numpy as np
import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.assess import assess
from mentalglm_jax.evaluate.bartscore import Bart, bart_score
from mentalglm_jax.evaluate.inputs import Answers
from mentalglm_jax.evaluate.report import render
from mentalglm_jax.text import tasks

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"我很难过开心睡不着的人"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "scaled"])
def oracle(request, tmp_path_factory):
    """A random BART of two and one layers as transformers saves it, with a bias on its logits, and the model itself."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    directory = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    config = BartConfig(vocab_size=len(WORDS), d_model=16, encoder_layers=2, decoder_layers=1,
                        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
                        max_position_embeddings=40, init_std=0.5, scale_embedding=request.param, pad_token_id=0,
                        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=3)  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.final_logits_bias.normal_()
        for part in (model.model.encoder, model.model.decoder):
            part.layernorm_embedding.bias.normal_()
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return directory, model


@pytest.mark.parametrize(
    ("source", "target"), [("我很难过", "睡不着"), ("开心", "我很难过睡不着的人"), ("我", "我" * 60)]
)
def test_log_probabilities_are_those_of_transformers(oracle, source, target):
    import torch

    directory, model = oracle
    bart = Bart(directory)
    given, wanted = bart.tokens(source), bart.tokens(target)
    assert (wanted[0], wanted[-1]) == (2, 3) and len(wanted) <= 40
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([given]), labels=torch.tensor([wanted])).loss
    assert bart(source, target) == pytest.approx(-float(loss), abs=1e-4)


def test_what_is_averaged_and_shown(oracle):
    bart, question = Bart(oracle[0]), tasks.TASKS["suicide_risk"].question("zh")
    rows = []
    for number, (said, reference) in enumerate((("我很难过", "睡不着"), ("开心的人", None), (None, "我"))):
        record = Record(f"r{number}", "suicide_risk", "zh", "很难过", question, "high", explanation=reference)
        rows.append(record.to_dict() | {"parsed_label": "high", "parsed_explanation": said})
    answers = [
        Answer(Record.from_dict(row, allow_extra=True), ("high",), row["parsed_explanation"], "ok") for row in rows
    ]
    found = bart_score(bart, answers)
    assert set(found) == {"zh"} and (found["zh"]["n"], found["zh"]["missing"]) == (1, 1)
    assert found["zh"]["from_post"] == pytest.approx(np.mean([bart("很难过", "我很难过"), bart("很难过", "开心的人")]))
    there, back = bart("睡不着", "我很难过"), bart("我很难过", "睡不着")
    assert found["zh"]["from_reference"] == pytest.approx(there) and found["zh"]["to_reference"] == pytest.approx(back)
    assert found["zh"]["f"] == pytest.approx((there + back) / 2)
    result, _ = assess(Answers(rows, []), encoder=oracle[0])
    assert result["suicide_risk"]["explanation"]["bart_score"] == found
    assert f"{found['zh']['f']:.3f}" in render(result, title="t")


def test_what_is_no_bart_is_named(oracle, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((oracle[0] / name).read_bytes())
    with pytest.raises(InputError, match=r"neither tokenizer.json nor vocab.txt"):
        Bart(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((oracle[0] / "vocab.txt").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_layers": 2}), encoding="utf-8")
    with pytest.raises(InputError, match=r"tensor 'model.decoder.layers.1.* is missing"):
        Bart(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(InputError, match="model_type 't5'"):
        Bart(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="damaged"):
        Bart(tmp_path)
    with pytest.raises(InputError, match="not a BART directory"):
        Bart(tmp_path / "absent")
