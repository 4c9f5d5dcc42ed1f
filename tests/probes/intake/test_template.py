"""Templates of strangers: rendered as transformers renders them, and kept from time, memory and everything else."""

import json
import re
import sys
from pathlib import Path

import pytest
import transformers

from probes.errors import ProbeInputError
from probes.intake.template import chat_template, read_template, render


def test_renders_as_transformers_does(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    template = (
        "{{ eos_token }}{%- for turn in messages %}\n{%- if turn.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}\n[{{ turn.role }}] {{ turn.content | trim | tojson }}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}\n[assistant]{% endif %}"
    )
    turns = [{"role": "user", "content": ' 我 "ok" '}, {"role": "assistant", "content": "<b>"}]
    wanted = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    contexts = [
        {"messages": messages, "add_generation_prompt": True, "eos_token": "<|endoftext|>"}
        for messages in (turns, [{"role": "system", "content": "x"}])
    ]
    found = render(template, contexts, "T")
    assert found[0] == wanted
    assert isinstance(found[1], ProbeInputError) and "no system" in str(found[1])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}", "took more than|MiB"),
        ("{% set ns = namespace(a='x') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
         "MiB|characters|took more than"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% for", "cannot be rendered"),
    ],
)  # fmt: skip
def test_a_hostile_template_is_refused(template: str, said: str) -> None:
    try:
        found = render(template, [{"messages": []}], "T")[0]
    except ProbeInputError as error:
        found = error
    assert isinstance(found, ProbeInputError) and re.search(said, str(found)), found


def test_where_the_template_is_looked_for(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert chat_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert chat_template(tmp_path) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert chat_template(tmp_path) == "four"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(ProbeInputError, match="chat_template is a int"):
        chat_template(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ProbeInputError, match="a link to a file outside"):
        chat_template(tmp_path / "model")


def test_a_template_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ProbeInputError, match="is no UTF-8 text"):
        read_template(tmp_path / "t.jinja")


SLOW = "import time; from probes.intake import template\nwhile time.process_time() < 2.05: pass\ntemplate._main()"


def test_a_template_does_not_pay_for_a_slow_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine what is imported takes the seconds of processor time that a template may."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -P -c '{SLOW}'\n", "utf-8")
    python.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("probes.intake.template._SECONDS", 2)
    assert render("{{ post }}", [{"post": "a"}], "T") == ["a"]
