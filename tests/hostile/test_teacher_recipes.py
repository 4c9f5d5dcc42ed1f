"""Recipes, wordings, keys and posts that `mentalglm data build` is given, before a token is paid for."""

import json
import os
import urllib.parse
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.data.explain import key_owners, prompts
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import called
from tests.hostile.teacher_world import KEY, World, accepted
from tests.mentalglm_jax.endpoint import behaving


@pytest.fixture
def world(tmp_path, capsys, monkeypatch) -> World:
    monkeypatch.setenv("HOSTILE_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return World(tmp_path, capsys)


# --- what it is sent ---


def test_settings_go_by_the_names_of_the_server_or_not_at_all(world):
    names = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": "random_seed"}
    with behaving() as server:
        accepted(world.build(server.url, names=names, extra_body={"thinking": {"type": "disabled"}}))
        sent = server.requests[0]
    assert set(sent) - {"path", "authorization"} == {
        "model",
        "messages",
        "max_completion_tokens",
        "random_seed",
        "thinking",
    }
    assert (sent["max_completion_tokens"], sent["random_seed"], sent["thinking"]) == (512, 0, {"type": "disabled"})


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (
            {"names": {"max_tokens": None}, "max_total_tokens": 5},
            r"names\.max_tokens: null leaves answers without bound",
        ),
        ({"names": {"top_p": "p"}}, r"teacher\.names\.top_p"),
        ({"names": {"seed": "temperature"}}, "'temperature' is sent already"),
        ({"names": {"seed": "messages"}}, "'messages' is sent already"),
        ({"extra_body": {"stream": True}}, "'stream' is sent already"),
        ({"extra_body": {"max_tokens": 10**9}}, "'max_tokens' is sent already"),
        ({"extra_body": {"x": float("nan")}}, r"teacher\.extra_body\.x.*finite"),
        ({"base_url": "file:///etc/passwd"}, "base_url: not an address of an http"),
        ({"base_url": "http://user:hunter2@"}, "base_url: not an address of an http"),
        ({"base_url": "http://user:hunter2@h:99999/v1"}, "base_url: not an address of an http"),
        ({"base_url": "http://user:hunter2@h\n/v1"}, "base_url: not an address of an http"),
        ({"api_key_env": "sk-hunter2"}, r"teacher\.api_key_env"),
        *(
            ({"api_key_env": name}, rf"api_key_env: {name} is no name for the key of a teacher")
            for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "SSH_PRIVATE_KEY", "HOME", "PATH")
        ),
        ({"api_key": "sk-hunter2"}, r"unknown key 'teacher\.api_key' \(did you mean 'api_key_env'\?\)"),
        ({"model": "m\ud83d"}, r"teacher\.model|UTF-8|YAML"),
        ({"timeout": float("inf")}, r"teacher\.timeout"),
        ({"timeout": 1e300}, r"teacher\.timeout"),
        ({"max_tokens": 10**18}, r"teacher\.max_tokens"),
        ({"concurrency": 10**9}, r"teacher\.concurrency"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_named_and_no_secret_with_it(world, teacher, says):
    path = (
        world.recipe("http://127.0.0.1:9/v1", teacher) if "\ud83d" not in str(teacher) else world.recipe("http://h", {})
    )
    if "\ud83d" in str(teacher):
        path.write_text(path.read_text("utf-8").replace("model: m", 'model: "m\\ud83d"'), encoding="utf-8")
    line = refused(run(["mentalglm", "data", "build", path], world._capsys), says)
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "url", ["https://stranger.invalid/v1", "http://127.0.0.1.stranger.invalid/v1", "https://api.openai.com.invalid/v1",
            "https://api.openai.com@stranger.invalid/v1", "https://notopenai.com/v1"],
)  # fmt: skip
def test_the_key_of_another_house_is_not_sent_to_where_a_recipe_says(world, monkeypatch, url):
    """The usual variable is set on many machines; a recipe that came with a data set names the address."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    line = refused(world.build(url, api_key_env="OPENAI_API_KEY"), "OPENAI_API_KEY is a key of openai.com, and http")
    assert KEY not in line


@pytest.mark.parametrize(
    ("variable", "owner"), [("WANDB_API_KEY", "wandb.ai"), ("ANTHROPIC_API_KEY", "anthropic.com"),
                            ("AZURE_OPENAI_API_KEY", "azure.com"), ("deepseek_KEY", "deepseek.com"),
                            ("MY_WANDB_API_KEY", "wandb.ai"), ("WANDBKEY", "wandb.ai"), ("PROD_XAI_KEY", "x.ai"),
                            ("TEACHER_WANDB_KEY", "wandb.ai")],
)  # fmt: skip
@pytest.mark.parametrize("url", [None, "https://stranger.invalid/v1"])
def test_nor_is_that_of_any_known_service(world, monkeypatch, variable, owner, url):
    """Not to OpenAI either, which is where answers come from that name no address."""
    monkeypatch.setenv(variable, KEY)
    line = refused(world.build(url, api_key_env=variable), f"{variable} is a key of {owner}, and ")
    assert KEY not in line


@pytest.mark.parametrize("variable", ["KAGGLE_KEY", "STRIPE_API_KEY", "RAILS_MASTER_KEY", "API_KEY", "KEY"])
@pytest.mark.parametrize("url", [None, "https://stranger.invalid/v1", "https://kaggle.stranger.invalid/v1",
                                 "https://kaggle.xyz.co.uk", "https://kaggle@a.invalid",
                                 "https://stripe-api.invalid", "https://master.invalid", "http://1.2.3.4"])  # fmt: skip
def test_nor_is_a_key_of_which_nobody_knows_whose_it_is(variable, url):
    says = rf"{variable} may be a key of something else, and (http|api\.openai\.com would)"
    refused(called(lambda: key_owners.check_owner(variable, url)), says)


def test_nor_by_the_command(world, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    line = refused(world.build("https://kaggle.invalid.com/v1", api_key_env="KAGGLE_KEY"), "KAGGLE_KEY may be a key of")
    assert KEY not in line


@pytest.mark.parametrize(
    ("variable", "url"), [("TEACHER_API_KEY", "https://llm.example.org/v1"), ("my_teacher_KEY", "http://10.0.0.7:8000"),
                          ("MY_LAB_API_KEY", "https://llm.my-lab.ac.uk/v1"), ("MYLAB_KEY", "https://mylab.example"),
                          ("GPU7_KEY", "https://gpu7:8000/v1"), ("SILICONFLOW_API_KEY", "https://api.siliconflow.cn/v1"),
                          ("MYLAB_KEY", "https://llm.mylab.com/v1"), ("MYLAB_KEY", "https://llm.my-lab.edu/v1"),
                          ("MY_OPENAI_KEY", "https://api.openai.com/v1"),
                          ("ARK_API_KEY", "https://ark.cn-beijing.volces.com/api/v3"),
                          ("MINIMAX_API_KEY", "https://api.minimax.io/v1"),
                          ("DASHSCOPE_API_KEY", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"),
                          ("DASHSCOPE_API_KEY", "https://dashscope.aliyuncs.com/compatible-mode/v1"),
                          ("AZURE_API_KEY", "https://me.services.ai.azure.com/openai/v1"),
                          ("AZURE_API_KEY", "https://me.cognitiveservices.azure.com/openai/v1"),
                          ("GEMINI_API_KEY", "https://generativelanguage.googleapis.com/v1beta/openai"),
                          ("NVIDIA_API_KEY", "https://integrate.api.nvidia.com/v1"),
                          ("ZHIPUAI_API_KEY", "https://open.bigmodel.cn/api/paas/v4"),
                          ("TEACHER_API_KEY", "https://mine.fly.dev/v1"), ("LAB_KEY", "http://127.0.0.1:8000/v1"),
                          ("OPENAI_API_KEY", None), ("AZURE_OPENAI_API_KEY", "https://me.openai.azure.com/v1")],
)  # fmt: skip
def test_a_key_that_is_named_for_its_host_may_go_there(variable, url):
    key_owners.check_owner(variable, url)


@pytest.mark.parametrize(
    ("variable", "url"),
    [("AZURE_OPENAI_API_KEY", "https://evil.eastus.cloudapp.azure.com/v1"), ("AZURE_KEY", "https://azure.com"),
     ("AZURE_API_KEY", "https://evil.eastus.inference.ml.azure.com"),
     ("DASHSCOPE_API_KEY", "https://1.cn-hangzhou.fc.aliyuncs.com/proxy"),
     ("DASHSCOPE_API_KEY", "https://dashscope.oss-cn-beijing.aliyuncs.com"),
     ("DASHSCOPE_API_KEY", "https://evildashscope.aliyuncs.com"), ("GEMINI_API_KEY", "https://evil.googleapis.com"),
     ("GOOGLE_API_KEY", "https://storage.googleapis.com/evil"), ("ARK_API_KEY", "https://ark.tos-cn-beijing.volces.com"),
     ("NVIDIA_API_KEY", "https://evil.invocation.api.nvcf.nvidia.com"), ("ZAI_API_KEY", "https://evil.space.z.ai"),
     ("MINIMAX_API_KEY", "https://evil.space.minimax.io")],
)  # fmt: skip
def test_nor_to_a_customer_of_the_service(variable, url):
    """Who rents a machine, a function or a bucket has a name below the service's."""
    refused(called(lambda: key_owners.check_owner(variable, url)), f"{variable} is a key of .* would get it; name the")


@pytest.mark.parametrize(
    ("variable", "host"),
    [("NGROK_API_KEY", "ngrok.io"), ("NGROK_API_KEY", "ngrok.app"), ("NGROK_KEY", "ngrok.dev"),
     ("NGROK_FREE_KEY", "ngrok-free.app"), ("FLY_API_KEY", "fly.dev"), ("VERCEL_API_KEY", "vercel.app"),
     ("NETLIFY_KEY", "netlify.app"), ("HEROKUAPP_KEY", "herokuapp.com"), ("ONRENDER_KEY", "onrender.com"),
     ("GITHUB_KEY", "github.io"), ("WORKERS_KEY", "workers.dev"), ("PAGES_KEY", "pages.dev"), ("RUN_KEY", "run.app"),
     ("TRYCLOUDFLARE_KEY", "trycloudflare.com"), ("AZUREWEBSITES_X", "azurewebsites.net"),
     ("AMAZONAWS_KEY", "s3.amazonaws.com"), ("MODAL_KEY", "modal.run"), ("RUNPOD_API_KEY", "proxy.runpod.net"),
     ("REPLIT_KEY", "replit.app"), ("ALIYUNCS_KEY", "fc.aliyuncs.com")],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["/v1", ".:443/v1"])
def test_nor_by_a_name_that_anybody_can_have(variable, host, ending):
    says = rf"{variable} (may be a key of something else|is a key of azure.com), and https.* would get it"
    refused(called(lambda: key_owners.check_owner(variable, f"https://evil.{host}{ending}")), says)


@pytest.mark.parametrize(
    ("variable", "host"),
    [("STRIPE_API_KEY", "stripe.lol"), ("STRIPE_API_KEY", "api.stripe.xyz"), ("STRIPE_KEY", "stripe.co.uk"),
     ("STRIPE_LIVE_KEY", "stripe-live.com"), ("STRIPE_LIVE_KEY", "stripelive.com"), ("STRIPE_KEY", "str-ipe.com"),
     ("STRIPE_KEY", "stripe.ac.lol"), ("API_KEY", "api.com"), ("KAGGLE_KEY", "kaggle.app")],
)  # fmt: skip
def test_nor_to_a_name_that_anybody_can_buy(variable, host):
    says = f"{variable} may be a key of something else, and https://{host}/v1 would get it"
    refused(called(lambda: key_owners.check_owner(variable, f"https://{host}/v1")), says)


def test_nor_does_a_key_of_the_host_s_name_travel_in_the_clear():
    says = "GPU7_KEY would be sent to gpu7 in the clear; write https"
    refused(called(lambda: key_owners.check_owner("GPU7_KEY", "http://gpu7:8000/v1")), says)


def test_a_service_s_key_does_not_travel_in_the_clear(world, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    line = refused(world.build("http://api.openai.com/v1", api_key_env="OPENAI_API_KEY"), "in the clear; write https")
    assert KEY not in line


@pytest.mark.parametrize("named", [True, False])
def test_the_usual_key_goes_where_the_environment_or_this_machine_is(world, monkeypatch, named):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with behaving() as server:
        if named:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        accepted(world.build(server.url, api_key_env="OPENAI_API_KEY"))
        assert server.requests[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["sk-hunter2\nX-Evil: 1", "sk-hunter2é", "sk-\u200bhunter2"])
def test_a_key_that_is_none_is_named_by_its_variable(world, monkeypatch, key):
    monkeypatch.setenv("HOSTILE_KEY", key)
    line = refused(world.build("http://127.0.0.1:9/v1"), "HOSTILE_KEY holds a character that no key has")
    assert "hunter2" not in line


def test_a_line_end_behind_the_key_is_no_part_of_it(world, monkeypatch):
    monkeypatch.setenv("HOSTILE_KEY", f" {KEY}\r\n")
    with behaving() as server:
        accepted(world.build(server.url))
        assert server.requests[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("url", "says", "code"),
    [
        ("http://☃☃.invalid/v1", "cannot be used", 2),
        ("http://127.0.0.1:1/v1", "last: no connection", 1),
        ("https://127.0.0.1:1/v1", "last: no connection", 1),
    ],
)
def test_an_address_where_nobody_is(world, monkeypatch, url, says, code):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    refused(world.build(url, retries=0, api_key_env="TEACHER_KEY"), says, code=code)
    assert world.written() == ""


@pytest.mark.parametrize("field", ["post", "question", "explanation"])
def test_half_a_surrogate_pair_is_named_before_a_token_is_paid(world, field):
    name = "experts" if field == "explanation" else "posts"
    path = world.folder / f"{name}.jsonl"
    row = json.loads(path.read_text("utf-8").splitlines()[1])
    rows = [json.dumps(row | {field: row[field] + "\ud83d", "id": "x"}), *path.read_text("utf-8").splitlines()]
    path.write_text("\n".join(rows), encoding="utf-8")
    with behaving() as server:
        refused(world.build(server.url), rf"{name}\.jsonl.*{field}.*surrogate")
        assert server.requests == []


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "[" * 5000,
        "{a: " * 5000,
        "- 1",
        "a: [",
        "a: " + "9" * 5000,
        "a: 2024-99-99",
        "x" * (2 << 20),
    ],
    ids=[
        "in itself",
        "multiplying",
        "deep list",
        "deep mapping",
        "list",
        "unbalanced",
        "5,000 digits",
        "no date",
        "large",
    ],
)
def test_a_recipe_that_is_no_recipe(world, text):
    path = world.folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    refused(run(["mentalglm", "data", "build", path], world._capsys), r"x\.yaml: ")


@pytest.mark.parametrize(
    "aliases",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a0: &a0 [x, x, x]\n" + "".join(f"    a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 14)),
    ],
    ids=["a list in itself", "a mapping in itself", "multiplying to millions"],
)
def test_aliases_where_any_value_may_stand_are_counted(world, aliases):
    path = world.recipe("http://127.0.0.1:9/v1", {})
    text = path.read_text("utf-8").replace("teacher:\n", f"teacher:\n  extra_body:\n    {aliases}\n")
    path.write_text(text, "utf-8")
    refused(
        run(["mentalglm", "data", "build", path], world._capsys),
        r"recipe\.yaml: not valid YAML \((an alias that holds itself|its aliases make more than 100000 values of it)\)",
    )


@pytest.mark.parametrize("value", ["[", "{a: " * 3000, "&a [*a]", "9" * 5000])
def test_an_override_that_is_no_value(world, value):
    path = world.recipe("http://127.0.0.1:9/v1", {})
    refused(run(["mentalglm", "data", "build", path, "--set", f"seed={value}"], world._capsys), "seed")


@pytest.mark.parametrize("place", ["{role:>9999999999}", "{role.__class__}", "{role!r}", "{0}", "{", "{}"])
def test_a_wording_has_places_and_no_formats(world, place):
    shipped = Path(prompts.__file__).parents[2] / "assets" / "prompts" / "zh.yaml"
    wording = yaml.safe_load(shipped.read_text("utf-8")) | {"system": f"{place} {{criteria}} {{rules}}"}
    (world.folder / "own.yaml").write_text(yaml.safe_dump(wording, allow_unicode=True), encoding="utf-8")
    path = world.recipe("http://127.0.0.1:9/v1", {}, prompts=str(world.folder / "own.yaml"))
    refused(run(["mentalglm", "data", "build", path], world._capsys), r"own\.yaml: a wording holds an unknown place")


def test_the_names_that_say_where_it_ran_are_not_published(world):
    with behaving() as server:
        accepted(world.build(server.url))
    assert str(world.folder) not in (world.folder / "out" / "manifest.json").read_text("utf-8")
    assert urllib.parse.urlsplit(server.url).netloc in (world.folder / "out" / "manifest.json").read_text("utf-8")


@pytest.mark.parametrize("made", ["review/a.json", "notes.txt", "records/train.jsonl", "link", "manifest.json", "fifo"])
def test_no_build_takes_away_what_people_put_into_its_folder(world, made):
    """A form with its ratings, a corrected record, another command's folder: the build writes its folder anew."""
    with behaving() as server:
        accepted(world.build(server.url))
        accepted(world.build(server.url))
        path = world.folder / "out" / made
        path.parent.mkdir(exist_ok=True)
        if made == "link":
            path.symlink_to(world.folder / "posts.jsonl")
        elif made == "fifo":
            os.mkfifo(path)
        else:
            path.write_text('{"written by": "somebody"}\n')
        line = refused(world.build(server.url), "out")
    assert made.split("/")[-1] in line and (made in ("link", "fifo") or "somebody" in path.read_text())


def test_a_file_where_the_build_writes_a_folder(world):
    (world.folder / "out").write_text("thesis")
    with behaving() as server:
        refused(world.build(server.url), "out: is a file")
        assert server.requests == [] and (world.folder / "out").read_text() == "thesis"


def test_a_cache_that_cannot_be_written_costs_nothing(world):
    (world.folder / "cache").write_text("a file")
    with behaving() as server:
        outcome = world.build(server.url)
        assert outcome.code in (1, 2) and server.requests == [] and "Traceback" not in outcome.err
