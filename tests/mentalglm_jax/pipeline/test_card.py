"""Model cards: valid for the Hub, complete, true of the format they lie beside. (What they must not say: test_push.)"""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mentalglm_jax.checkpoints.adapter_formats import FORMATS
from mentalglm_jax.checkpoints.model_card import Licence, adapter_card, licence_named, licence_of
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.report import results_table
from mentalglm_jax.model.lora import LoraConfig
from mentalglm_jax.pipeline.card import run_card
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.train.recipe import Recipe, what_it_is

TRAIN = {"steps": 3, "rows": 1, "sequence_length": 64}
CONTROL = {"name": "control", "tasks": ["suicide_risk"], "variant": "unfaithful", "train": TRAIN}
SCORES = {"n": 40, "weighted_f1": 0.8125, "micro_f1": 0.81, "macro_f1": 0.8, "ci95": [0.7, 0.9],
          "parse_failure_rate": 0.025, "cut_off": 1}  # fmt: skip
EVALUATION = {
    "suicide_risk": {
        **SCORES,
        "floors": {"majority": SCORES | {"weighted_f1": 0.333}, "tfidf_logreg": SCORES | {"weighted_f1": 0.769}},
        "label_reading": {**SCORES, "weighted_f1": 0.79},
    }
}  # fmt: skip
PROBES = {
    "n": 30, "conclusion": "supported", "verdicts": {"supported": 12, "contradicted": 1, "inconclusive": 17},
    "verdicts_by_chance": {"supported": 2.4, "contradicted": 1.9}, "mass_ratio": {"ig": 0.61, "gradnorm": 0.4},
    "mass_ratio_ci": {"ig": [0.55, 0.66]}, "mass_ratio_null": {"ig": 0.31}, "fabricated_quote_rate": 0.02,
}  # fmt: skip
STAGES = {
    "data": {
        "seconds": 1, "counts": {"suicide_risk": {"train": 900, "test": 40}, "cognitive_pathway": {"train": 7}},
        "labels": {"suicide_risk": {"high": 300, "low": 600}}, "languages": {"en": 450, "zh": 457}, "notes": [],
        "held_out": {"left_out": {"exact": 3, "near": 2}, "unknown_overlap": ["sos_hl_1k", "socialcd_3k"]},
    },
    "train english": {"seconds": 1, "steps": 400, "loss": 0.25},
    "train chinese": {"seconds": 1, "steps": 500, "loss": 0.125},
    "evaluate": {"seconds": 1},
    "probe": {"seconds": 1, "summary": PROBES, "check": {"diagnosticity": 0.9}},
}  # fmt: skip


def make(directory: Path, stages=STAGES, evaluation=EVALUATION, **changes) -> Run:
    recipe = {
        "run_dir": directory, "data": {"source": "upstream", "root": directory / "data", "sets": ["c_imhi"]},
        "model": {"path": "zai-org/glm-4-9b-chat-hf"}, "probe": {"control": CONTROL},
        "stages": [{"name": "english", "languages": ["en"], "train": TRAIN},
                   {"name": "chinese", "languages": ["zh"], "tasks": ["suicide_risk"], "replay": 0.4, "train": TRAIN}],
    }  # fmt: skip
    recipe = Recipe.model_validate({**recipe, **changes})
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"recipe": what_it_is(recipe), "stages": stages}))
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    (directory / "data" / "faithful").mkdir(parents=True, exist_ok=True)
    (directory / "data" / "faithful" / "dev.jsonl").write_text("{}\n")
    return Run(recipe)


def test_the_metadata_is_the_hubs(tmp_path):
    text = run_card(make(tmp_path / "run"), "peft", base="zai-org/glm-4-9b-chat-hf", repository="me/mine",
                    licence=Licence("other", "glm-4", "https://huggingface.co/x/y/blob/main/LICENSE"))  # fmt: skip
    data = ModelCard(text).data
    assert (data.base_model, data.get("base_model_relation")) == ("zai-org/glm-4-9b-chat-hf", "adapter")
    assert (data.license, data.license_name) == ("other", "glm-4")
    assert data.license_link == "https://huggingface.co/x/y/blob/main/LICENSE"
    assert (data.language, data.library_name, data.pipeline_tag) == (["en", "zh"], "peft", "text-generation")
    assert "mental-health" in data.tags and data.model_name == "mine"
    text_reading, label_reading = data.eval_results
    assert (text_reading.metric_type, text_reading.metric_value, label_reading.metric_value) == ("f1", 0.8125, 0.79)
    assert "0.700 to 0.900" in text_reading.metric_name and text_reading.dataset_split == "dev"


def test_the_card_says_all_that_a_reader_must_know(tmp_path):
    text = run_card(make(tmp_path / "run"), "peft", base="zai-org/glm-4-9b-chat-hf")
    for words in (
        "not a medical", "| suicide_risk | 900 | 0 | 40 | high 300, low 600 |", "5 training records were left out",
        "**Overlap unknown.** Published test posts of sos_hl_1k and socialcd_3k", "`data.accept_unknown_overlap`",
        "Published data sets: c_imhi.", "Stage 1: en, all tasks; 400 steps", "loss 0.125", "40% of earlier records",
        results_table(EVALUATION), "tfidf_logreg 0.769", "0.812 (0.700–0.900)",
        "on 30 posts of `suicide_risk`: The explanations cite what the model used more than chance would.",
        "| supported | 12 | 2.4 |", "0.610 (95 % CI 0.550 to 0.660), 0.310 by their length", "0.900 of pairs",
        "Not for diagnosis", "its licence could not be read", "one label of 2",
    ):  # fmt: skip
        assert words in text, words
    assert "english" not in text and "chinese" not in text  # names of stages are the user's own


def test_the_card_says_where_model_and_control_are_erased_in_two_ways(tmp_path):
    said = "Of model and control one has erased tokens cut out, the other hidden"
    for number, line in enumerate((None, "erase: <b>")):
        probe = {**STAGES["probe"], "check": {"diagnosticity": 0.9, "erased_otherwise": line}}
        text = run_card(make(tmp_path / f"run{number}", {**STAGES, "probe": probe}), "peft", base="org/base")
        assert (said in text) == (line is not None) and "<b>" not in text  # what a damaged run.json holds stays there


def test_labels_have_names_and_a_licence_its_origin(tmp_path):
    """`A1` tells a reader nothing; and what a user states is not the base's licence."""
    job = make(tmp_path / "run", stages={**STAGES, "data": {**STAGES["data"], "languages": {"en": 9}}})
    text = run_card(job, "peft", stage="english", base="org/base", licence=licence_named("mit"))
    assert "`high`, `low`." in text and "`A1` (disease symptom), `A2` (social relation)" in text
    assert "\nmit. The posts" in text
    assert "That of the base model, `org/base`: mit." in run_card(job, "peft", base="org/base", licence=Licence("mit"))
    assert "(gradnorm)" not in run_card(job, "peft")


def test_unknown_overlap_is_not_said_where_there_is_none(tmp_path):
    stages = {**STAGES, "data": {**STAGES["data"], "held_out": {"left_out": {"exact": 0, "near": 0}}}}
    text = run_card(make(tmp_path / "run", stages), "merged")
    assert "Overlap" not in text and "left out" not in text


@pytest.mark.parametrize("to", [*(one for one in FORMATS if one != "vllm"), "merged"])
def test_how_to_load_it_fits_the_format(tmp_path, to):
    text = run_card(make(tmp_path / "run"), to, base="org/base", repository="me/mine")
    loading = text[text.index("## How to load it") : text.index("## Licence")]
    for block in re.findall(r"```python\n(.*?)```", loading, re.DOTALL):
        ast.parse(block)
    assert ('mg.load("me/mine")' if to == "merged" else 'mg.load("org/base", adapter="me/mine")') in loading
    reads = {"peft": "PEFT transformers vLLM llama.cpp", "llama.cpp": "PEFT transformers llama.cpp",
             "vllm-split": "vLLM", "chatglm": "vLLM llama.cpp", "merged": "transformers vLLM llama.cpp"}  # fmt: skip
    marks = {"PEFT": "AutoPeftModelForCausalLM.from_pretrained",
             "transformers": " AutoModelForCausalLM.from_pretrained", "vLLM": "vllm serve",
             "llama.cpp": "_to_gguf.py"}  # fmt: skip
    for client, mark in marks.items():
        assert (mark in loading) == (client in reads[to].split()), (client, loading)
    assert ModelCard(text).data.library_name == {"merged": "transformers", "peft": "peft", "llama.cpp": "peft"}.get(
        to, "mentalglm-jax"
    )


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3.0}}])
def test_what_a_client_computes_wrongly_is_not_recommended(tmp_path, lora):
    text = run_card(make(tmp_path / "run", lora=lora), "peft", base="org/base")
    assert "convert_lora_to_gguf" not in text
    assert ("vllm serve" in text) == ("use_dora" not in lora)
    assert ("use PEFT" in text) == ("use_dora" in lora)


def test_an_earlier_stage_and_the_control_have_no_results(tmp_path):
    job = make(tmp_path / "run")
    first, control = run_card(job, "peft", stage="english"), run_card(job, "peft", stage="control")
    for text in (first, control):
        assert "0.812" not in text and not ModelCard(text).data.eval_results and "Not probed" in text
    assert "Stage 2" not in first and ModelCard(first).data.language == ["en"]
    assert "wrong on purpose" in control and "wrong on purpose" not in first


def test_a_run_that_is_not_evaluated(tmp_path):
    text = run_card(make(tmp_path / "run", {"data": STAGES["data"]}), "peft")
    assert "Not evaluated." in text and "model-index" not in text and "model_name" not in text
    assert "The base was a local copy" in text and ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    "damage",
    [{"data": {"seconds": 1, "counts": {"suicide_risk": 3}}}, {"data": {"seconds": 1, "counts": {"no_task": {}}}},
     {"probe": {"seconds": 1, "summary": {"n": "many"}}}, {"train english": {"seconds": 1, "steps": "x"}}],
)  # fmt: skip
def test_a_damaged_run_gives_one_line(tmp_path, damage):
    with pytest.raises(InputError) as refused:
        run_card(make(tmp_path / "run", {**STAGES, **damage}), "peft")
    assert "\n" not in str(refused.value)


def test_the_licence_is_read_from_the_card_of_the_base(tmp_path):
    def said(text):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        return licence_of(tmp_path, "org/base")

    assert licence_of(tmp_path, None) is None
    assert said("---\nlicense: mit\n---\n# x\n") == Licence("mit")
    whole = said("---\nlanguage:\n- zh\nlicense: other\nlicense_name: glm-4\nlicense_link: LICENSE\n---\n")
    assert whole == Licence("other", "glm-4", "https://huggingface.co/org/base/blob/main/LICENSE")
    assert said("# no head\n") is None and said("---\nlicense: [a]\n---\n") is None
    assert licence_named("Apache-2.0") == Licence("apache-2.0", stated=True)
    with pytest.raises(InputError, match="--license"):
        licence_named("my own")


def test_the_card_of_a_bare_adapter(tmp_path):
    text = adapter_card(LoraConfig(rank=4, use_rslora=True), "org/base")
    assert ModelCard(text).data.base_model == "org/base" and "# rsLoRA adapter for `org/base`" in text
    assert ModelCard(adapter_card(LoraConfig(rank=4), None)).data.base_model is None
