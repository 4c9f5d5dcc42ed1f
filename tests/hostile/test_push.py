"""What ``export --push`` gives away: nothing without being asked, nothing in public without being told, and no word of
the place and the person it comes from. The client is the real one; a server here writes down what it is sent."""

import json
import shutil

import pytest

from tests.hostile.attack import child, refused, run
from tests.hub import hub, point_at

SECRET = "alice-of-ward-7"
POST = "I wrote this at night and nobody may read it."
EXPORT = ["mentalglm", "export", "runs/trained", "--out", "exported", "--push", "someone/model"]
BASE = ["--base-name", "someone/base"]


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """A trained run whose every input has a name that must not be told."""
    place = tmp_path / "home" / SECRET
    shutil.copytree(template, place)
    shutil.copytree(place / "model", place / "trained" / "tokenizer")
    (place / "runs").mkdir()
    (place / "trained").rename(place / "runs" / "trained")
    state = json.loads((place / "runs/trained/run.json").read_text())
    state["recipe"]["model"]["path"] = str(place / "model")
    state["recipe"]["tokenizer"]["path"] = str(place / "model")
    state["recipe"]["data"] |= {"root": str(place / "data")}
    state["recipe"]["stages"][0]["weights"] = {f"{SECRET}-diary": 2.0}
    state["stages"] = {
        "data": {"seconds": 1, "counts": {"suicide_risk": {"train": 2, "dev": 2}},
                 "labels": {"suicide_risk": {"low": 2}}, "languages": {"en": 2}, "notes": [f"{place}: {POST}"],
                 "say": [POST],
                 "held_out": {"left_out": {"exact": 1, "near": 0}, "unknown_overlap": ["sos_hl_1k", SECRET]}},
        "train a": {"seconds": 1, "steps": 2, "loss": 0.5, "say": [f"1 examples are too long (first: {POST})"]},
        "evaluate": {"seconds": 1},
    }  # fmt: skip
    (place / "runs/trained/run.json").write_text(json.dumps(state))
    shutil.copy(place / "finished/evaluation.json", place / "runs/trained/evaluation.json")
    first, *rows = (place / "finished/generations.jsonl").read_text().splitlines(keepends=True)
    first = json.dumps(json.loads(first) | {"id": POST, "post": POST}) + "\n"
    (place / "runs/trained/generations.jsonl").write_text(first + "".join(rows))
    shutil.copytree(place / "data", place / "runs/trained/data/faithful")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as state:
        point_at(state, monkeypatch, tmp_path / "cache")
        yield state


def told(state):
    """All that left this machine, uploaded files decoded."""
    return b"\n".join([*(f"{how} {where}".encode() + body for how, where, body in state.requests),
                       *(data for files in state.files.values() for data in files.values())])  # fmt: skip


def uploads(state):
    return [path for how, path, _ in state.requests if how == "POST" and "/commit/" in path]


@pytest.mark.parametrize("to", ["peft", "vllm", "llama.cpp", "merged"])
@pytest.mark.parametrize("public", [[], ["--public"]], ids=["private", "public"])
def test_what_is_pushed_is_private_and_names_nobody(world, server, capsys, to, public):
    outcome = run([*EXPORT, "--to", to, *BASE, *public], capsys)
    assert outcome.code == 0, outcome.err
    (created,) = server.sent("POST", "/api/repos/create")
    assert created["visibility"] == ("public" if public else "private")
    assert f"{server.url}/someone/model: uploaded, {'public' if public else 'private'}" in outcome.out
    assert set(server.files["someone/model"]) == {path.name for path in (world / "exported").iterdir()}
    assert not [word for word in (SECRET, str(world), POST, POST[:20]) if word.encode() in told(server)]
    assert len(uploads(server)) == 1 and b"README.md" in told(server)


def test_private_is_what_the_console_script_asks_for(world):
    """The whole of it in a process of its own, as a user starts it."""
    with hub() as state:
        environment = {
            "HF_ENDPOINT": state.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(world / "hf"),
        }
        outcome = child([*EXPORT, "--to", "peft", *BASE], world, environment=environment)
        assert outcome.code == 0, outcome.err
        assert [one["visibility"] for one in state.sent("POST", "/api/repos/create")] == ["private"]
        assert state.repositories == {"someone/model": True}
        assert SECRET.encode() not in told(state)


def test_a_dry_run_sends_nothing(world, server, capsys):
    outcome = run([*EXPORT, "--to", "merged", *BASE, "--dry-run"], capsys)
    assert outcome.code == 0, outcome.err
    assert not [request for request in server.requests if request[0] == "POST"]
    card = (world / "exported/README.md").read_text("utf-8")
    assert card in outcome.out and "model.safetensors" in outcome.out and "nothing was uploaded" in outcome.out


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_a_base_that_is_a_path_has_to_be_named(world, server, capsys, to):
    refused(run([*EXPORT, "--to", to], capsys), "would publish the local path of the base.*--base-name ORG/NAME")
    assert not server.requests and not (world / "exported").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x/y", "", "https://huggingface.co/a/b", "-x/y", "ü/x"])
def test_a_repository_that_is_none(world, server, capsys, name):
    command = [*EXPORT[:-1], name, "--to", "peft", *BASE]
    refused(run(command, capsys), "--push .*give a Hub repository, ORG/NAME")
    assert not server.requests and not (world / "exported").exists()


def test_a_public_repository_is_not_pushed_to_by_accident(world, server, capsys):
    server.repositories["someone/model"] = False
    outcome = run([*EXPORT, "--to", "peft", *BASE], capsys)
    refused(outcome, "someone/model: is a public repository, nothing was uploaded; say --public")
    assert not uploads(server) and not (world / "exported").exists()


def test_a_repository_that_becomes_public_meanwhile(world, server, capsys, monkeypatch):
    """Found out before anything is sent, not only before the work."""
    create = server.answer

    def answer(method, path, body):
        if path == "/api/repos/create":
            server.repositories["someone/model"] = False
        return create(method, path, body)

    monkeypatch.setattr(server, "answer", answer)
    refused(run([*EXPORT, "--to", "peft", *BASE], capsys), "is a public repository, nothing was uploaded")
    assert not uploads(server)


def test_public_does_not_open_what_is_private(world, server, capsys):
    server.repositories["someone/model"] = True
    outcome = run([*EXPORT, "--to", "peft", *BASE, "--public"], capsys)
    assert outcome.code == 0 and "uploaded, private" in outcome.out


@pytest.mark.parametrize("token", [None, "hf_wrong"], ids=["no token", "a wrong token"])
def test_nobody_is_logged_in(world, server, capsys, monkeypatch, tmp_path, token):
    point_at(server, monkeypatch, tmp_path / "cache", token)
    server.refuses["GET /api/whoami-v2"] = 401
    refused(run([*EXPORT, "--to", "peft", *BASE], capsys), "hf auth login")
    assert not uploads(server) and not (world / "exported").exists()


@pytest.mark.parametrize(
    "path", ["POST /api/repos/create", "POST /api/models/someone/model/commit", "POST /api/validate-yaml"]
)
def test_the_hub_refuses(world, server, capsys, path):
    server.refuses[path] = 403
    outcome = run([*EXPORT, "--to", "peft", *BASE], capsys)
    refused(outcome, r"someone/model: the Hub (refused with status 403|cannot be reached)", code=1)
    assert (world / "exported/adapter_model.safetensors").exists() and "someone/model" not in server.files


def test_the_hub_is_not_there(world, server, capsys, monkeypatch, tmp_path):
    server.url = "http://127.0.0.1:9"
    point_at(server, monkeypatch, tmp_path / "cache")
    refused(run([*EXPORT, "--to", "peft", *BASE], capsys), "someone/model: the Hub cannot be reached", code=1)


def test_offline_is_said(world, server, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run([*EXPORT, "--to", "peft", *BASE], capsys), "HF_HUB_OFFLINE is set, so nothing can be uploaded")


@pytest.mark.parametrize("planted", ["place", "home"])
def test_a_path_in_a_file_that_goes_along(world, server, capsys, planted):
    """A chat template is the user's own; it may say where it was written."""
    path = {"place": world / "model", "home": "/home/bob/secret"}[planted]
    template = world / "runs/trained/tokenizer/chat_template.jinja"
    template.write_text(f"{{#- {path} -#}}{template.read_text('utf-8')}")
    refused(run([*EXPORT, "--to", "merged", *BASE], capsys), r"chat_template\.jinja: names .*would be published")
    assert not uploads(server)


@pytest.mark.parametrize("licence", ["../etc", "a b", "<b>", "x" * 80, "mit\nbase_model: x"])
def test_a_licence_that_is_none(world, capsys, licence):
    refused(run([*EXPORT[:-2], "--to", "peft", "--license", licence], capsys), "--license .*give the Hub's identifier")


@pytest.mark.parametrize(
    "said",
    ["license: [mit]", "license: {a: 1}", "license: '../../x'", "license: mit\nlicense: gpl", "- mit",
     "license: &a [*a]", "license: '<script>'", "license: mit\nlicense_link: 'javascript:1'",
     "license: other\nlicense_link: 'file:///etc/passwd'"],
)  # fmt: skip
def test_a_base_whose_card_is_hostile(world, server, capsys, said):
    (world / "model" / "README.md").write_text(f"---\n{said}\n---\n# x\n")
    outcome = run([*EXPORT, "--to", "peft", *BASE], capsys)
    assert outcome.code == 0, outcome.err
    card = server.files["someone/model"]["README.md"].decode()
    assert not [word for word in ("javascript", "file:", "<script", "..", "gpl") if word in card]


def test_uploads_are_readable_as_what_they_are(world, server, capsys):
    """The server decodes what it was sent: the same bytes."""
    assert run([*EXPORT, "--to", "merged", *BASE], capsys).code == 0
    for path in (world / "exported").iterdir():
        assert server.files["someone/model"][path.name] == path.read_bytes()
