"""The Hub's model card: the metadata block, through ``huggingface_hub``'s own classes, and the parts every card has."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import parse_yaml, read_text
from mentalglm_jax.markdown import code
from mentalglm_jax.model.lora import LoraConfig

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
TAGS = ["lora", "mental-health", "mentalglm-jax"]
SAFETY = """A research instrument for studying language about mental health. It is not a diagnosis and not a medical
device; its labels and explanations can be wrong in ways that read convincingly. Do not act on them without a qualified
person. If someone may be in danger, contact local emergency services or a crisis line."""
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LINK = re.compile(r"https://[\w.~/%#?=&+-]{1,300}")


@dataclass(frozen=True)
class Licence:
    """As the Hub's metadata has it: ``name`` and ``link`` go with the licence "other"; ``stated`` by the user, or that
    of the base."""

    licence: str = "other"
    name: str | None = None
    link: str | None = None
    stated: bool = False


def licence_named(name: str) -> Licence:
    """The licence a user states. Raises: InputError unless it is one word, as the Hub's identifiers are."""
    if _LICENCE.fullmatch(name) is None:
        raise InputError(f"--license {name!r}: give the Hub's identifier of a licence, such as mit or apache-2.0")
    return Licence(name.lower(), stated=True)


def licence_of(directory: Path, base: str | None) -> Licence | None:
    """What the card in a model directory says of its licence; None where it says nothing that can be read.

    Args:
        base: Hub id of that model, for a licence file that is named without its address.
    """
    try:
        text = read_text(directory / CARD, MAX_CARD_BYTES)
        head = re.match(r"\ufeff?\s*---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        said = parse_yaml(head[1], str(directory / CARD)) if head else None
    except (InputError, OSError):
        return None
    if not isinstance(said, Mapping) or not _word(said.get("license")):
        return None
    link, name = said.get("license_link"), said.get("license_name")
    if _word(link) and base is not None:
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    known = isinstance(link, str) and _LINK.fullmatch(link) is not None
    return Licence(str(said["license"]), str(name) if _word(name) else None, str(link) if known else None)


def _word(value: object) -> bool:
    return isinstance(value, str) and _LICENCE.fullmatch(value) is not None


def licence_sentence(licence: Licence | None, base: str | None) -> str:
    """What a card says of its licence."""
    if licence is None:
        whose = f"`{base}`" if base else "its base model"
        return f"The terms of {whose} apply; its licence could not be read when this card was written."
    named = f"{licence.name} ({licence.licence})" if licence.name else licence.licence
    if base is None or licence.stated:
        return f"{named}{f', {licence.link}' if licence.link else ''}."
    return f"That of the base model, `{base}`: {named}{f', {licence.link}' if licence.link else ''}."


def licence_fields(licence: Licence | None, base: str | None) -> dict[str, str | None]:
    """The same as fields of ``card_text``; without a licence or a base there is nothing to say."""
    if licence is None:
        link = f"https://huggingface.co/{base}" if base else None
        return {"license": "other", "license_name": "of-the-base-model", "license_link": link} if base else {}
    return {"license": licence.licence, "license_name": licence.name, "license_link": licence.link}


def card_text(fields: Mapping[str, Any], title: str, sections: Iterable[tuple[str, str]]) -> str:
    """README.md: the metadata block that the Hub reads, a title, and sections of Markdown.

    Args:
        fields: of ``huggingface_hub.ModelCardData``; those that are None are left out.
        sections: heading and text; the text alone where the heading is empty.

    Raises:
        ValueError: from ``huggingface_hub``, for metadata that is none.
    """
    from huggingface_hub import ModelCard, ModelCardData

    parts = [f"# {title}", *(f"## {heading}\n\n{text}" if heading else text for heading, text in sections)]
    body = "\n\n".join(part.strip() for part in parts)
    block = ModelCardData(**fields).to_yaml()
    return str(ModelCard(f"---\n{block}\n---\n\n{body}\n"))


def adapter_card(config: LoraConfig, base: str | None) -> str:
    """README.md of an adapter directory of which no more is known than what is in it.

    Args:
        base: Hub id of the base model; None leaves it out.
    """
    fields = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation", "tags": TAGS}
    return card_text(fields, f"{adapter_kind(config)} adapter{f' for `{base}`' if base else ''}",
                     [("", adapter_sentence(config)), ("Safety", SAFETY)])  # fmt: skip


def adapter_kind(config: LoraConfig) -> str:
    """What the field calls such an adapter."""
    return "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"


def adapter_sentence(config: LoraConfig) -> str:
    """Rank, scale and modules."""
    targets = config.target_modules
    targets = code(targets) if isinstance(targets, str) else ", ".join(map(code, targets))
    return (f"Rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}, on {targets}. It is valid only "
            "with the base model, and the rope_theta, it was trained with.")  # fmt: skip
