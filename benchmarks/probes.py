"""Time of the probes' engine against Captum's LLM wrappers (correct settings), same model, same post, equality beside.

    python -P benchmarks/probes.py [--hidden 256] [--layers 4] [--post 80] [--explanation 30 60 120] [--json]
    python -P benchmarks/probes.py --model DIR [--before 300] [--post 40] [--explanation 20] --repeat 1 --no-costs

(-P keeps this folder, whose file is called like the package, out of the import path.)

* integrated gradients of label and explanation: ``LLMGradientAttribution(LayerIntegratedGradients)``, which runs one
  integration per output token, against two integrations of summed log p.
* erasure of every post token: ``LLMAttribution(FeatureAblation)`` with ``forward_in_tokens=False`` (its default path is
  wrong with transformers >= 5.3), which runs one sequence at a time, against the batched engine.
* where they are installed (``pip install inseq shap``): Inseq's integrated gradients, which also run once per output
  token, with another baseline and over the answer so far as well, so that only the cosine of the two maps of the post
  can be shown; and exact Shapley values of four clauses by shap, over a forward as its user would write it.

* cost against the length of post and explanation, and against the units erased.

With ``--model`` it is a real one, in float32; ``--before`` puts so many words of instruction before the post, which the
engine runs once and keeps.

Both sides of a ratio alternate in one process and the medians of ``--repeat`` rounds are compared, because the machine
may be shared; on a CPU they are processor seconds, for the same reason. Peak memory is what a side adds to the process
(Linux), or to the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import (
    FeatureAblation,
    IntegratedGradients,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)

from probes.probe import Probe
from probes.records import Example
from probes.saliency.erase import MaskTable, _values
from probes.saliency.settings import Settings
from probes.validation.selftest import _tokenizer

LABEL = "HIGH"


class Ran(NamedTuple):
    """Seconds, MiB that were added at most, and what came out."""

    seconds: float
    memory: float
    found: Any


def probe_of(hidden: int, layers: int, device: str) -> Probe:
    """A random GLM of real geometry in small."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, attention_bias=True, initializer_range=0.1,
        max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    with torch.no_grad():  # zero at initialisation, which would hide a wrong baseline
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = torch.randn(hidden) * 0.1
    return Probe(torch.nn.Module.to(model, device), tokenizer, "random GLM")


def example_of(probe: Probe, post: int, explanation: int, before: int = 0) -> Example:
    """A row whose post is lower case and whose template is not, so that Captum can be told by token what to leave.

    Args:
        post, explanation: characters. before: words of instruction before the post.
    """
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz,"), post))
    said = "".join(rng.choice(list("ABCDEFGHIJKLMNOP"), explanation))
    encode, opening = probe.token_bytes.encode, "READ AND JUDGE. " * (before // 3)
    return probe.encode({
        "id": "b", "post": text, "prompt_ids": encode(f"{opening}POST: {text} ?"),
        "output_ids": encode(f"{LABEL}. {said}"), "label_text": LABEL, "parsed_label": "h", "parsed_explanation": said,
    })  # fmt: skip


def alternated(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, Ran]:
    """Median seconds of each run over ``repeat`` rounds in which they take turns, and its last result."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in runs}
    most, found = dict.fromkeys(runs, 0.0), {}
    for _ in range(repeat):
        for name, run in runs.items():
            before, began = resident(anew=True), clock()
            found[name] = run()
            times[name].append(clock() - began)
            most[name] = max(most[name], (resident() - before) / 2**20)
    return {name: Ran(float(np.median(times[name])), most[name], found[name]) for name in runs}


def resident(anew: bool = False) -> int:
    """The most bytes that this process, or the device, has held since it was last counted ``anew``: now, that is."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats() if anew else None
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if anew:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def gap(found: Any, wanted: Any) -> float:
    """Largest difference over the largest value."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def our_gradients(probe: Probe, example: Example, steps: int) -> Callable[[], list[np.ndarray]]:
    """The engine: one integration of summed log p per target, all steps in as few batches as fit."""

    def run() -> list[np.ndarray]:
        found = []
        for target in ("label", "explanation"):
            forward = probe.scorer.forward(example, (target,))
            ig = IntegratedGradients(lambda post, forward=forward: forward(post)[:, 0])
            rows = probe.scorer.batch_rows(forward.tokens)
            values = ig.attribute(forward.post[None], forward.neutral[None], n_steps=steps, internal_batch_size=rows)
            found.append(values[0].double().sum(-1).cpu().numpy())
        return found

    return run


def against_peers(probe: Probe, example: Example, steps: int, repeat: int) -> list[dict[str, Any]]:
    """IG and erasure, peers and the engine, on log p of the label and of the explanation."""
    tokenizer, (first, last) = probe.tokenizer, example.post_tok
    prompt = example.text[: sum(1 for at in example.char_bytes[:-1] if at < example.byte_spans[example.prompt_len][0])]
    kept = sorted({*example.ids[:first], *example.ids[last : example.prompt_len]})
    if shared := set(kept) & set(example.ids[first:last]):
        raise SystemExit(f"{len(shared)} tokens of the post stand in the template too; Captum cannot tell them apart")
    inputs = TextTokenInput(prompt, tokenizer, baselines=probe.pad_id, skip_tokens=kept)
    answer = torch.tensor(example.ids[example.prompt_len :])
    spans = [s.tok for s in example.segments if s.name in ("label", "explanation")]

    def by_target(found: Any) -> list[np.ndarray]:
        rows = found.token_attr.detach().double().cpu().numpy()
        return [rows[a - example.prompt_len : b - example.prompt_len].sum(0) for a, b in spans]

    def captum_ig() -> list[np.ndarray]:
        layer = LayerIntegratedGradients(probe.model, probe.model.get_input_embeddings())
        wrapper = LLMGradientAttribution(layer, tokenizer)
        return by_target(wrapper.attribute(inputs, target=answer, n_steps=steps))

    def captum_erase() -> list[np.ndarray]:
        wrapper = LLMAttribution(FeatureAblation(probe.model), tokenizer)
        return by_target(wrapper.attribute(inputs, target=answer, forward_in_tokens=False))

    our_ig = our_gradients(probe, example, steps)

    def our_erase() -> list[np.ndarray]:
        forward = probe.scorer.forward(example, ("label", "explanation"))
        table = MaskTable.of(forward, Settings(units="token", eraser="neutral"))
        scores = table(torch.cat([torch.ones(1, table.count), 1 - torch.eye(table.count)]))
        return list((scores[0] - scores[1:]).T.numpy())

    rows = []
    runs = (("integrated gradients", captum_ig, our_ig), ("erasure", captum_erase, our_erase))
    for name, theirs, ours in runs:
        ours()  # first call of a shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = alternated({"theirs": theirs, "ours": ours}, repeat)
        theirs_, ours_ = found["theirs"], found["ours"]
        worst = max(gap(a, b) for a, b in zip(ours_.found, theirs_.found, strict=True))
        rows.append(beside(name, "Captum", len(answer), theirs_, ours_) | {"max_relative_difference": worst})
    return rows


def beside(what: str, peer: str, tokens: int, theirs: Ran, ours: Ran) -> dict[str, Any]:
    """Seconds of both sides, their ratio, and the memory that each added."""
    return {"what": what, "peer": peer, "tokens": tokens, "peer_s": theirs.seconds, "ours_s": ours.seconds,
            "ratio": theirs.seconds / ours.seconds, "peer_mib": theirs.memory, "ours_mib": ours.memory}  # fmt: skip


def _inseq(probe: Probe, example: Example, steps: int) -> Callable[[], list[np.ndarray]]:
    """Inseq's integrated gradients of every answer token, summed over those of label and explanation."""
    import inseq

    probe.model.config.bos_token_id = probe.model.config.eos_token_id  # without one it does not load GLM
    model = inseq.load_model(probe.model, "integrated_gradients", tokenizer=probe.tokenizer)
    first, last = example.post_tok
    prompt = example.text[: sum(1 for at in example.char_bytes[:-1] if at < example.byte_spans[example.prompt_len][0])]
    spans = [s.tok for s in example.segments if s.name in ("label", "explanation")]

    def run() -> list[np.ndarray]:
        out = model.attribute(prompt, example.text, n_steps=steps, show_progress=False)
        found = out.sequence_attributions[0].target_attributions.detach().double().sum(-1).cpu().numpy()
        return [found[first:last, a - example.prompt_len : b - example.prompt_len].sum(1) for a, b in spans]

    return run


def _shap(probe: Probe, example: Example, owner: torch.Tensor, count: int) -> Callable[[], list[np.ndarray]]:
    """shap's exact explainer over clauses, one plain batched forward per call of its own."""
    import shap

    first, last = example.post_tok
    ids = torch.tensor(example.ids)
    spans = [s.tok for s in example.segments if s.name in ("label", "explanation")]

    def score(rows: np.ndarray) -> np.ndarray:
        batch = ids.repeat(len(rows), 1)
        kept = torch.as_tensor(rows).bool()[:, owner]
        batch[:, first:last] = torch.where(kept, batch[:, first:last], probe.pad_id)
        with torch.no_grad():
            logp = probe.model(input_ids=batch).logits.float().log_softmax(-1)[:, :-1]
        picked = logp.gather(2, batch[:, 1:, None])[..., 0]
        return np.stack([picked[:, a - 1 : b - 1].sum(1).numpy() for a, b in spans], 1)

    explainer = shap.explainers.Exact(score, np.zeros((1, count)))
    return lambda: list(explainer(np.ones((1, count))).values[0].T)


def against_others(probe: Probe, example: Example, steps: int, repeat: int) -> list[dict[str, Any]]:
    """Inseq and shap beside the engine, whichever is installed."""
    from importlib.util import find_spec

    rows: list[dict[str, Any]] = []
    tokens = len(example.ids) - example.prompt_len
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if find_spec("inseq") is not None:
            ours = our_gradients(probe, example, steps)
            found = alternated({"inseq": _inseq(probe, example, steps), "ours": ours}, repeat)
            pairs = zip(found["ours"].found, found["inseq"].found, strict=True)
            near = min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)
            row = beside("integrated gradients", "Inseq", tokens, found["inseq"], found["ours"])
            rows.append(row | {"cosine": near})
        if find_spec("shap") is not None:
            forward = probe.scorer.forward(example, ("label", "explanation"))
            settings = Settings(eraser="neutral", max_units=4)
            table = MaskTable.of(forward, settings)

            def ours_shap() -> list[np.ndarray]:
                table.table.clear()
                return [_values(table, column, "shap", settings) for column in range(2)]

            theirs_shap = _shap(probe, example, table.owner, table.count)
            theirs_shap()  # compiles on its first call
            found = alternated({"shap": theirs_shap, "ours": ours_shap}, repeat)
            worst = max(gap(a, b) for a, b in zip(found["ours"].found, found["shap"].found, strict=True))
            row = beside("Shapley values, exact", "shap", tokens, found["shap"], found["ours"])
            rows.append(row | {"max_relative_difference": worst})
    return rows


def costs(probe: Probe) -> list[dict[str, Any]]:
    """Seconds per post against post length, explanation length and units."""
    from probes.saliency.attribute import attribute

    rows = []
    for post, explanation, units in ((40, 30, "clause"), (80, 30, "clause"), (160, 30, "clause"), (80, 60, "clause"),
                                     (80, 120, "clause"), (80, 30, "token")):  # fmt: skip
        example = example_of(probe, post, explanation)
        row: dict[str, Any] = {"post": post, "explanation": explanation, "units": units}
        for method in ("ig", "erase", "gradnorm"):
            settings = Settings(units=units, max_steps=64)
            run = {"": lambda m=method, s=settings, e=example: attribute(probe, e, (m,), settings=s)}
            row[method] = alternated(run, 1)[""].seconds
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, value in (("hidden", 256), ("layers", 4), ("post", 80), ("steps", 16), ("repeat", 3), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", help="a model directory, instead of a random GLM")
    parser.add_argument("--before", type=int, default=0, help="words before the post")
    parser.add_argument("--explanation", type=int, nargs="+", default=[30, 60, 120], help="tokens, one run each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-costs", action="store_true", help="leave out the table of costs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    probe = (
        Probe.from_pretrained(given.model, device=given.device)
        if given.model
        else probe_of(given.hidden, given.layers, given.device)
    )
    examples = [example_of(probe, given.post, size, given.before) for size in given.explanation]
    result = {
        "settings": vars(given),
        "against_peers": [
            row
            for e in examples
            for side in (against_peers, against_others)
            for row in side(probe, e, given.steps, given.repeat)
        ],
        "costs": [] if given.no_costs else costs(probe),
    }
    if given.json:
        print(json.dumps(result))
        return
    for row in result["against_peers"]:
        gap_ = row.get("max_relative_difference")
        equal = f"cosine {row['cosine']:.2f}" if gap_ is None else f"largest relative difference {gap_:.1e}"
        print(f"{row['what']:22}{row['tokens']:4} answer tokens  {row['peer']} {row['peer_s']:.2f} s, ours "
              f"{row['ours_s']:.2f} s: {row['ratio']:.1f} x, {equal}; at most {row['peer_mib']:.0f} and "
              f"{row['ours_mib']:.0f} MiB more")  # fmt: skip
    for row in result["costs"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
