"""`mentalglm serve` and `mentalglm chat` as a user starts them."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import openai
import pexpect
import pytest
import yaml
from flax import nnx
from pexpect import fdpexpect

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.devices.hardware import free_memory
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.decode import apart_bytes
from mentalglm_jax.inference.generate import answer_text, generate, generate_ids
from mentalglm_jax.model.lora import LoraConfig, add_lora, has_lora, merge_lora
from mentalglm_jax.serve.server import check_cache
from mentalglm_jax.text.tasks import forget_added
from mentalglm_jax.text.tokenizer import GlmTokenizer
from tests.hostile.attack import refused, run
from tests.mentalglm_jax.serve.served import save_small_model

PROGRAM = str(Path(sys.executable).with_name("mentalglm"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "small"
    save_small_model(directory)
    return directory


@pytest.fixture(scope="module")
def adapter_dir(model_dir) -> Path:
    model = load(str(model_dir))
    add_lora(model, LoraConfig(rank=2, alpha=64.0), nnx.Rngs(1))
    down = model.layers.mlp.down_proj.adapter
    down.b.set_value(down.b[...] + 0.7)
    save_adapter(model, model_dir.parent / "mine")
    return model_dir.parent / "mine"


def test_serve_with_an_adapter_and_a_key_until_it_is_interrupted(model_dir, adapter_dir, tmp_path):
    key = tmp_path / "key"
    key.write_text("sk-of-a-file\n")
    process = subprocess.Popen(
        [PROGRAM, "serve", str(model_dir), "--adapter", str(adapter_dir), "--port", "0", "--api-key-file", str(key),
         "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["url"].startswith("http://127.0.0.1:") and said["model"] == "mine"
        with openai.OpenAI(base_url=said["url"], api_key="sk-of-a-file") as client:
            answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "A post."}],
                                                    max_tokens=8)  # fmt: skip
        with openai.OpenAI(base_url=said["url"], api_key="another") as other, pytest.raises(openai.AuthenticationError):
            other.models.list()
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "A post" not in err
    tokenizer, base = GlmTokenizer.load(model_dir), load(str(model_dir))
    adapted = load(str(model_dir), adapter=str(adapter_dir))
    assert has_lora(adapted)
    expected = generate(merge_lora(adapted), tokenizer, "A post.", 8)
    assert answer.choices[0].message.content == expected != generate(base, tokenizer, "A post.", 8)


def test_serve_refuses_what_it_cannot_do(model_dir, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(
            run(["mentalglm", "serve", model_dir, "--port", port], capsys), f"port {port} cannot be used.*--port", 1
        )
    for content in ("", "  \n", "two words\n", "ключ\n", "a\nb\n"):
        (tmp_path / "key").write_text(content)
        outcome = run(["mentalglm", "serve", model_dir, "--port", 0, "--api-key-file", tmp_path / "key"], capsys)
        refused(outcome, "key: holds no key")
    refused(run(["mentalglm", "serve", model_dir, "--api-key-file", tmp_path / "none"], capsys), "none: cannot be read")
    monkeypatch.setenv("MENTALGLM_API_KEY", "")
    refused(run(["mentalglm", "serve", model_dir, "--port", 0], capsys), "MENTALGLM_API_KEY: holds no key")
    monkeypatch.delenv("MENTALGLM_API_KEY")
    refused(run(["mentalglm", "serve", tmp_path / "nowhere", "--port", 0], capsys), "nowhere")


def test_a_cache_that_cannot_fit_is_told_before_anything_is_served(model_dir, capsys, monkeypatch):
    """One layer, two heads of 8, float32: 128 bytes a token and row, and 4 for whose it is; 16 rows of 6144 columns."""
    one = 16 * 6144 * 132 + 4
    large = ["mentalglm", "serve", model_dir, "--port", 0, "--batch-size", 12]
    monkeypatch.setattr("mentalglm_jax.inference.decode.free_memory", lambda device: 0)  # no layers laid apart
    monkeypatch.setattr("mentalglm_jax.serve.server.free_memory", lambda device: 2 * one - 1)
    refused(run(large, capsys), "the cache of 12 requests of 4096 tokens takes up to 0.02 GiB while it grows, and 0.02 "
            "GiB are free; --batch-size 8 or --context 2048 fits")  # fmt: skip
    monkeypatch.setattr("mentalglm_jax.serve.server.free_memory", lambda device: 1000)
    refused(run(large, capsys), "free; free some, or take a smaller model")
    tokens = load(str(model_dir))
    for free, says in ((2 * one, "12 requests of 4096 tokens .* GiB are free$"), (None, "while it grows$")):
        monkeypatch.setattr("mentalglm_jax.serve.server.free_memory", lambda device, free=free: free)
        assert re.search(says, check_cache(tokens, 12, 8192))
    monkeypatch.setattr("mentalglm_jax.inference.decode.free_memory", lambda device: 1 << 30)
    apart = apart_bytes(nnx.split(tokens)[1])
    assert apart > 0
    for more in (0, -1):
        monkeypatch.setattr("mentalglm_jax.serve.server.free_memory", lambda device, m=more: 2 * one + apart + m)
        with pytest.raises(InputError, match="12 requests") if more else contextlib.nullcontext():
            check_cache(tokens, 12, 8192)


def test_free_memory_is_that_of_this_machine_or_of_its_device():
    class Device:
        def __init__(self, platform, stats):
            self.platform, self.memory_stats = platform, lambda: stats

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(Device("cpu", None)) < total
    assert free_memory(Device("gpu", {"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert free_memory(Device("tpu", None)) is None is free_memory(Device("tpu", {}))


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra_is_named(model_dir, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(run(["mentalglm", "serve", model_dir, "--port", 0], capsys), r"serve extra.*\.\[serve\]")


@pytest.fixture
def terminal(model_dir, request):
    """A terminal with a session in it (no fork: JAX has threads here); the first prompt has been read."""
    length = str(getattr(request, "param", 12))
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    process = subprocess.Popen(
        [PROGRAM, "chat", str(model_dir), "--max-new-tokens", length], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    child = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=600)
    child.process = process
    child.expect("not a diagnosis")
    child.expect("\n> ")
    yield child
    process.kill()
    process.wait()
    child.close()


def heard(child) -> str:
    child.expect("\r\n> ")
    return child.before.replace("\r\n", "\n")


def shown(text: str) -> str:
    from mentalglm_jax.cli.output import inert

    return "\n".join(map(inert, text.split("\n")))


def test_a_session_in_a_terminal(terminal, model_dir):
    tokenizer, model = GlmTokenizer.load(model_dir), load(str(model_dir))

    def says(messages):
        from mentalglm_jax.inference.generate import answer_text, generate_ids

        (ids,) = generate_ids(model, [tokenizer.ask_ids(messages)], max_new_tokens=12, eos_ids=tokenizer.eos_ids,
                              vocab_limit=tokenizer.vocab_size)  # fmt: skip
        return answer_text(tokenizer, ids)

    def turn(role, content):
        return {"role": role, "content": content}

    def ask(line):
        terminal.sendline(line)
        return heard(terminal)

    first = says([turn("user", "A post.")])
    assert ask("A post.") == shown(first)
    second = says([turn("user", "A post."), turn("assistant", first), turn("user", "And now?")])
    assert ask("And now?") == shown(second)
    assert "new conversation" in ask("/reset") and ask("A post.") == shown(first)
    assert "new conversation" in ask("/system Be brief.")
    briefly = says([turn("system", "Be brief."), turn("user", "A post.")])
    assert ask("A post.") == shown(briefly) and briefly != first
    assert "/quit" in ask("/help")
    assert "no such command" in ask("/quite")
    terminal.sendline('"""')
    terminal.sendline("/reset")
    terminal.sendline("on two lines")
    terminal.sendline('"""')
    assert says([turn("system", "Be brief."), turn("user", "A post."), turn("assistant", briefly),
                 turn("user", "/reset\non two lines")]) in heard(terminal)  # fmt: skip
    terminal.sendline("/quit")
    assert terminal.process.wait(600) == 0


LEAVES = "Ctrl-D or /quit leaves\r\n> "


def interrupt(child, expected: str) -> str:
    """What comes after Ctrl-C. Python hears a signal late that comes between the prompt and the waiting for a key, so
    another is sent then."""
    for _ in range(20):
        child.process.send_signal(signal.SIGINT)
        if child.expect([expected, pexpect.TIMEOUT], timeout=5) == 0:
            return child.before
    raise AssertionError(child.before)


@pytest.mark.parametrize("terminal", [3000], indirect=True)
def test_an_interrupt_stops_the_answer_and_not_the_session(terminal):
    for _ in range(10):
        terminal.sendline("A post.")
        terminal.expect(r"\w")
        assert "Traceback" not in interrupt(terminal, f" …\r\n> |{LEAVES}")
        if terminal.after.startswith(" …"):
            break
        terminal.sendline("/reset")  # the answer, of seconds, was over before this process went on
        terminal.expect("a new conversation\r\n> ")
    else:
        raise AssertionError("no answer was stopped")
    terminal.sendline("/nonsense")
    terminal.expect("/nonsense: no such command.*\r\n> ")
    interrupt(terminal, LEAVES)
    terminal.sendline("/quit")
    assert terminal.process.wait(600) == 0


@pytest.mark.parametrize("terminal", [3000], indirect=True)
def test_an_interrupt_before_the_first_word(terminal):
    """While the program is compiled, or before the line was read at all."""
    terminal.sendline("A post.")
    assert "Traceback" not in interrupt(terminal, f" …\r\n> |{LEAVES}")
    terminal.sendline("/quit")
    assert terminal.process.wait(600) == 0


def test_control_characters_of_an_answer_do_nothing(model_dir, capsys, monkeypatch):
    """An answer that would clear the screen, set the title or write over the line before it."""
    import io

    from mentalglm_jax.cli import chat

    tokenizer = GlmTokenizer.load(model_dir)
    bad = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9be\u202ef\nnext"
    monkeypatch.setattr("mentalglm_jax.inference.decode.generate_ids", lambda model, prompts, *, stream, **options: [
        stream(0, token) for token in tokenizer.encode("\n" + bad)
    ])  # fmt: skip
    monkeypatch.setattr(chat, "load_model", lambda *given, **named: (None, tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("A post.\n\n"))
    outcome = run(["mentalglm", "chat", "anywhere"], capsys)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("a\\x1b[2Jb\\x1b]0;title\\x07c\\rd\\x9be\\u202ef\nnext\n")


OWN = """tasks:
  week:
    kind: single
    question: {en: 'Good or bad?', zh: '好还是坏？'}
    sentence: {en: 'It is {}.', zh: '是{}。'}
    system: {en: 'Be brief.', zh: '请简短。'}
    labels: {good: {}, bad: {}}
"""


def test_with_a_task_what_is_typed_is_a_post_of_its_own(model_dir, tmp_path, capsys, monkeypatch):
    """Asked in its language and in the task's words; the one before it is not part of it."""
    import io

    (tmp_path / "t.yaml").write_text(OWN, encoding="utf-8")
    posts = ["It rained.", "今天下雨了。", "12345", "It rained."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(posts) + "\n/quit\n"))
    asking = ["mentalglm", "chat", model_dir, "--task", "week", "--tasks", tmp_path / "t.yaml", "--max-new-tokens", 8]
    try:
        outcome = run(asking, capsys)
    finally:
        forget_added()
    assert outcome.code == 0 and "the language of the post cannot be told" in outcome.err
    tokenizer, model = GlmTokenizer.load(model_dir), load(str(model_dir))

    def says(system, prompt):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        (ids,) = generate_ids(model, [tokenizer.ask_ids(turns)], max_new_tokens=8, eos_ids=tokenizer.eos_ids,
                              vocab_limit=tokenizer.vocab_size)  # fmt: skip
        return shown(answer_text(tokenizer, ids)) + "\n"

    english = says("Be brief.", 'Consider this post: "It rained." Question: Good or bad?')
    chinese = says("请简短。", '考虑以下这个帖子："今天下雨了。" 问题：好还是坏？')
    assert outcome.out == english + chinese + english and english != chinese


def test_options_of_a_task(model_dir, capsys):
    refused(run(["mentalglm", "chat", model_dir, "--task", "suicide_rosk"], capsys), "did you mean 'suicide_risk'")
    refused(run(["mentalglm", "chat", model_dir, "--language", "en"], capsys), "--language goes with --task")


def test_a_line_that_cannot_be_said_leaves_the_session_as_it_was(model_dir, capsys, monkeypatch):
    import io

    lines = "word " * 5000 + "\n/nonsense\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    outcome = run(["mentalglm", "chat", model_dir, "--max-new-tokens", 4], capsys)
    assert outcome.code == 0
    first, second = outcome.err.splitlines()
    assert "context is 4096" in first and "/reset" in first
    assert "/nonsense: no such command" in second


def test_the_docs_page_says_what_the_command_says():
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text("utf-8")
    assert len(page.splitlines()) <= 120
    assert yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["teacher"]["base_url"]
