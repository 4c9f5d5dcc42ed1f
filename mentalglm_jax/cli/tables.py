"""What commands show as tables."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from mentalglm_jax.cli.output import cell

if TYPE_CHECKING:
    from mentalglm_jax.planning.answering import AnswerPlan
    from mentalglm_jax.planning.plan import Plan


def summary_table(summary: dict[str, Any]) -> Table:
    """The one table a run ends with: parity, scores beside their floors, probes."""
    split = summary.get("eval_split")  # a run finished by an earlier version does not say
    table = Table(title=f"Result on the {split} records" if split else "Result", title_justify="left", show_edge=False,
                  header_style="bold")  # fmt: skip
    for name, justify in (("what", "left"), ("value", "right"), ("beside", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("merged", "adapter"):
        if (found := summary["parity"].get(f"{name}_max_abs_logit_diff")) is not None:
            same, total = summary["parity"][f"{name}_greedy_identical"]
            table.add_row(f"{name} export vs transformers/PEFT: max |Δ logit|", f"{found:.1e}",
                          f"greedy answers identical: {same}/{total}")  # fmt: skip
    for task, entry in summary["eval"].items():
        for metric in ("weighted_f1", "micro_f1", "macro_f1"):
            floor = ", ".join(f"{name} {scores[metric]:.3f}" for name, scores in entry["floors"].items())
            low, high = entry["ci95"]
            more = f"95 % CI {low:.3f}–{high:.3f}, " if metric == "weighted_f1" else ""
            table.add_row(f"{task} {metric.replace('_', ' ')} (n = {entry['n']})", f"{entry[metric]:.3f}",
                          f"{more}floors: {floor}")  # fmt: skip
        table.add_row(f"{task} answers that could not be parsed", f"{entry['parse_failure_rate']:.1%}", "")
    probes = summary["probes"]
    for key, what in (("cue_auroc", "saliency finds the planted cue: AUROC"),
                      ("mass_ratio", "positive saliency inside the cited span: share")):  # fmt: skip
        values = probes.get(key) or {}
        if values and all(value is None for value in values.values()):
            if key == "mass_ratio":  # without a cue nothing was planted, and there is nothing to find
                table.add_row(what, "–", "" if probes.get("n_quotes") else "no explanation quotes its post")
            continue
        for method, value in values.items():
            null = (probes.get("mass_ratio_null") or {}).get(method) if key == "mass_ratio" else 0.5
            beside = f"chance {null:.3f}" if isinstance(null, float) else ""
            table.add_row(f"{what} ({method})", "–" if value is None else f"{value:.3f}", beside)
    if (probes.get("completeness_delta") or {}).get("mean") is not None:  # the fast budget has no integrated gradients
        table.add_row(
            "integrated gradients: mean completeness delta", f"{probes['completeness_delta']['mean']:.2%}", ""
        )
    if counts := probes.get("verdicts"):
        chance = probes.get("verdicts_by_chance") or {}
        random = " / ".join(f"{chance[name]:.1f}" for name in counts if name in chance)
        table.add_row(f"explanations {' / '.join(counts)} (n = {probes['n']})", " / ".join(map(str, counts.values())),
                      f"{probes['conclusion']}; random citations: {random}")  # fmt: skip
    if probes.get("diagnosticity") is not None:
        table.add_row("faithful vs unfaithful control: diagnosticity", f"{probes['diagnosticity']:.3f}", "chance 0.5")
    table.add_row("seconds in all", f"{sum(summary['seconds'].values()):.0f}", "")
    return table


def plan_table(found: "Plan") -> Table:
    """A plan as one table."""
    shape, least, gib = found.shape, found.bound, 2**30
    memory = found.compiled or found.estimated
    source = "compiled" if found.compiled else "estimated; the compiler refused"
    table = Table(title=cell(f"{found.model}, stage {found.stage!r} on {found.topology}"), title_justify="left",
                  show_edge=False, header_style="bold")  # fmt: skip
    table.add_column("per device")
    table.add_column("", justify="right")
    for name, value in (("weights", memory.weights), ("adapter and optimiser", memory.adapters + memory.optimizer),
                        (f"activations ({source})", memory.activations), ("total", found.total),
                        ("memory", found.device_memory)):  # fmt: skip
        table.add_row(name, f"{value / gib:.2f} GiB")
    table.add_row("fits", "yes" if found.fits else "no")
    if found.advice:
        table.add_row("turn", cell(found.advice))
    sizes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    table.add_row("mesh", sizes)
    table.add_row("exchanges", ", ".join(f"{n} {kind}" for kind, n in found.collectives.items()) or "none")
    if found.any_order is not None:
        table.add_row("with the devices in reverse", "the same" if found.any_order else "others")
    table.add_section()
    table.add_row("one step", f"{least.tokens:,} tokens: {shape.rows * shape.data * shape.fsdp} rows of {shape.length}"
                  f" x {shape.accumulate}")  # fmt: skip
    if found.pairs is not None:
        count = f"{found.pairs.per_row:,} pairs and {found.pairs.targets:,} answer tokens"
        table.add_row("a row holds at most", count if found.pairs.exact else f"{count}; no file of pairs yet")
    table.add_row("model FLOPs (4N, half of causal attention)", f"{least.model_flops:.3e}")
    table.add_row("executed FLOPs (with recomputation, adapter)", f"{least.executed_flops:.3e}")
    for name in ("compute", "bandwidth", "links"):
        table.add_row(f"at least, {name}", f"{getattr(least, name):.3f} s")
    table.add_row("at most", f"{least.tokens_per_second:,.0f} tokens/s (by {least.limit})")
    return table


def answer_plan_table(found: "AnswerPlan") -> Table:
    """A plan of answers as one table."""
    gib = 2**30
    table = Table(title=cell(f"{found.model}, answers on {found.topology}"), title_justify="left", show_edge=False,
                  header_style="bold")  # fmt: skip
    table.add_column("per device")
    table.add_column("", justify="right")
    table.add_row("weights", f"{found.weights / gib:.2f} GiB")
    table.add_row(f"cache, {found.slots:,} tokens a post", f"{found.cache / gib:.2f} GiB")
    for name, size in found.programs.items():
        table.add_row(f"in all, {name} (compiled)", "refused" if size is None else f"{size / gib:.2f} GiB")
    if found.needed is not None:
        table.add_row("would need", f"{found.needed / gib:.2f} GiB")
    table.add_row("memory", f"{found.device_memory / gib:.2f} GiB")
    table.add_row("fits", "yes" if found.fits else "no")
    table.add_row("mesh", " x ".join(f"{axis} {size}" for axis, size in found.mesh.items()), end_section=True)
    table.add_row(
        "a batch", f"{found.batch} posts of up to {found.prompt_tokens:,} tokens, {found.new_tokens} new ones"
    )
    table.add_row("at least, a token of each", f"{1000 * found.step_seconds:.2f} ms (by memory bandwidth)")
    table.add_row("at most", f"{found.tokens_per_second:,.0f} tokens/s")
    return table
