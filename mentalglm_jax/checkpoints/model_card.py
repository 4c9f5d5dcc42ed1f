"""The Hub's model card of what we write."""

from mentalglm_jax.model.lora import LoraConfig


def adapter_card(config: LoraConfig, base: str | None) -> str:
    """README.md of an adapter directory, with the metadata block that the Hub reads.

    Args:
        base: Hub id of the base model; None leaves it out.
    """
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets = config.target_modules
    targets = f"`{targets}`" if isinstance(targets, str) else ", ".join(targets)
    front = f"base_model: {base}\n" if base else ""
    return f"""---
{front}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- mental-health
- mentalglm-jax
---

# {kind} adapter for {base or "a GLM-4 model"}

Rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}, on {targets}.
It is valid only with the base model, and the rope_theta, it was trained with.

## Safety

A research instrument for studying language about mental health. It is not a diagnosis and not a medical device; its
labels and explanations can be wrong in ways that read convincingly. Do not act on them without a qualified person. If
someone may be in danger, contact local emergency services or a crisis line.
"""
