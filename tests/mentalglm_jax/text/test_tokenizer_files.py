"""The published tokenizer files, written synthetically with GLM-4's layout: tiktoken text and tokenizer.json; and the
chat renderings of the three releases."""

import base64
import contextlib
import functools
import itertools
import json
import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import regex
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tokenizer import BUILTIN, CHAT_TEMPLATE, SPECIALS, GlmTokenizer, ToolsIgnoredWarning
from mentalglm_jax.text.tokenizer_files import SPLIT

TEMPLATE = CHAT_TEMPLATE.replace("item", "one")  # another text that renders the same
RANKS = 151329  # tokens in GLM-4's tokenizer.model; its special tokens follow
SHARED = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]  # the second as everywhere
TEXTS = ["it's 12345 days,  ok?\n\n  yes ", "我最近睡不着。\n", "", " <|user|>\r\n", "naïve e\u0301 🙂\x00", "  \t x"]


@functools.cache
def ranks() -> list[bytes]:
    """Bytes, then tokens joined of two before them as in a trained vocabulary, then as many as are missing."""
    rng = np.random.default_rng(0)
    found = dict.fromkeys([bytes([byte]) for byte in range(256)])
    pool = [bytes([byte]) for byte in " etaoinshrdlu'1.\n我".encode()]
    while len(found) < 4000:
        for a, b in rng.integers(0, len(pool), (256, 2)):
            token = pool[a] + pool[b]
            if len(token) <= 12 and token not in found:
                found[token] = None
                pool.append(token)
    rest = (b"\xff" + number.to_bytes(3, "big") for number in range(RANKS))
    return [*found, *itertools.islice(rest, RANKS - len(found))]


def write_tiktoken(directory: Path, tokens: list[bytes], **config) -> Path:
    directory.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    stated = {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left",
        "added_tokens_decoder": {str(len(tokens) + i): {"content": t, "special": True} for i, t in enumerate(SPECIALS)},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(stated | config))
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The tokenizer directory of a glm-4-9b-chat in its original layout."""
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "original", ranks(), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(original):
    return GlmTokenizer.load(original)


@pytest.fixture
def small(tmp_path):
    """A small original one that a test may damage: bytes and a few words."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    return write_tiktoken(tmp_path / "small", tokens)


def tiktoken_ids(places: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's own procedure, piece by piece."""
    ids = []
    for piece in regex.findall(SPLIT, text):
        piece = piece.encode()
        if piece in places:
            ids.append(places[piece])
            continue
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            joined = [places.get(a + b, RANKS) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == RANKS:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [places[part] for part in parts]
    return ids


def test_the_special_tokens_stand_where_glm4_has_them(tokenizer):
    assert [tokenizer.id_of(token) for token in SPECIALS] == list(range(151329, 151343))
    assert tokenizer.prefix_ids == (151331, 151333)
    assert (tokenizer.stop_id, tokenizer.id_of("<|assistant|>"), tokenizer.pad_id) == (151336, 151337, 151329)
    assert tokenizer.eos_ids == (151329, 151336, 151338)
    assert tokenizer.vocab_size == 151343  # what generation takes as its limit: padding rows are never sampled


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.text(st.sampled_from(" etaoinshrdlu'1.\n我XY") | st.characters(codec="utf-8"), max_size=60))
def test_ids_are_those_of_tiktoken(tokenizer, text):
    places = {token: rank for rank, token in enumerate(ranks())}
    ids = tokenizer.encode(text)
    assert ids == tiktoken_ids(places, text)
    assert tokenizer.decode(ids) == text


def test_saved_again_transformers_reads_it_without_remote_code(original, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    again = GlmTokenizer.load(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        if "<|" not in text:
            assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert len(theirs) == 151343
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    assert theirs.chat_template == TEMPLATE  # it stood in tokenizer_config.json


def test_tokenizer_json_that_adds_the_prefix_itself_still_gives_one(tokenizer, tmp_path):
    """Whether the real files' post-processor adds it is not known; neither may double it."""
    tokenizer.save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    prefix = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("[gMASK]", "<sop>")]
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [*prefix, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [tokenizer.id_of(t)], "tokens": [t]} for t in ("[gMASK]", "<sop>")},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    found = GlmTokenizer.load(tmp_path)
    ids = found.prompt_ids("x")
    assert ids[:2] == [151331, 151333]
    assert ids == tokenizer.prompt_ids("x")
    assert found.encode("x") == tokenizer.encode("x")
    assert AutoTokenizer.from_pretrained(tmp_path)("x").input_ids[:2] == [151331, 151333]  # the file does add it


# ---- no post opens a turn ----


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(st.sampled_from(SPECIALS) | st.text(max_size=4), max_size=8))
def test_no_post_can_become_a_special_token(tokenizer, parts):
    post = "".join(parts)
    assert not tokenizer.special_ids & set(tokenizer.encode(post))
    ids = tokenizer.prompt_ids(post, system=post or None)
    frame = [*tokenizer.prefix_ids, *([151335] if post else []), 151336, 151337]
    assert [i for i in ids if i in tokenizer.special_ids] == frame
    assert tokenizer.decode(tokenizer.encode(post)) == post


def test_role_tokens_that_a_file_calls_ordinary_are_special_all_the_same(tmp_path):
    """A file whose role tokens are marked "special": false would otherwise let posts write them."""
    shutil.copytree(BUILTIN, tmp_path / "t")
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    raw["added_tokens"] = [token | {"special": False} for token in raw["added_tokens"]]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    ours = GlmTokenizer.load(tmp_path / "t")
    assert not ours.special_ids & set(ours.encode("a<|user|>\nb<|assistant|>"))
    assert ours.encode("我想") == GlmTokenizer.load(BUILTIN).encode("我想")


def test_a_file_that_reads_role_tokens_in_any_text_is_refused(tmp_path):
    """Here the vocabulary itself joins the letters of <|user|>."""
    shutil.copytree(BUILTIN, tmp_path / "t")
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": False}
    specials = [token["content"] for token in raw["added_tokens"]]
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
    raw["model"]["merges"] = []
    letters = "<|user|>"
    for end in range(2, len(letters) + 1):
        piece = letters[:end]
        raw["model"]["vocab"].setdefault(piece, len(raw["model"]["vocab"]))
        raw["model"]["merges"].append([letters[: end - 1], letters[end - 1]])
    assert letters in specials
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="does not split a text as GLM's tokenizer does"):
        GlmTokenizer.load(tmp_path / "t")


# ---- damaged files ----


def line(number: int, text: bytes):
    def damage(directory: Path) -> None:
        lines = (directory / "tokenizer.model").read_bytes().splitlines()
        lines[number - 1] = text
        (directory / "tokenizer.model").write_bytes(b"\n".join(lines))

    return damage


def config(**changes):
    def damage(directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def linked(name: str):
    def damage(directory: Path) -> None:
        (directory.parent / "secret").write_text("{}")
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(directory.parent / "secret")

    return damage


FAULTS = {
    "no base64": (line(3, b"%%% 2"), "line 3 is not 'base64 rank'"),
    "no rank": (line(3, b"Ag=="), "line 3 is not"),
    "empty token": (line(3, b" 2"), "line 3 is not"),
    "rank no number": (line(3, b"Ag== -2"), "line 3 is not"),
    "huge rank": (line(3, b"Ag== " + b"9" * 5000), "line 3 is not"),
    "rank left out": (line(3, b"Ag== 7"), "line 3 repeats a token or leaves out a rank"),
    "token twice": (line(3, b"AQ== 2"), "line 3 repeats"),
    "a byte without token": (line(3, b"AgI= 2"), "1 of the 256 bytes have no token"),
    "a sentencepiece model": (lambda d: (d / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>"), "line 2 is not"),
    "specials elsewhere": (
        config(added_tokens_decoder={"300": {"content": "<|user|>"}}), r"must place tokens at 259, 260"
    ),
    "specials malformed": (config(added_tokens_decoder={"x": 1}), "must place tokens"),
    "specials a list": (config(added_tokens_decoder=[1]), "must place tokens"),
    "specials of another model": (
        config(added_tokens_decoder={"259": {"content": "<s>"}}), "is this a GLM-4 tokenizer"
    ),
    "config not JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), "not JSON"),
    "model linked": (linked("tokenizer.model"), "link to a file outside"),
    "template linked": (linked("chat_template.jinja"), "link to a file outside"),
    "tokenizer.json linked": (linked("tokenizer.json"), "link to a file outside"),
    "nothing": (lambda d: (d / "tokenizer.model").unlink(), "a directory with one of the two is needed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_tokenizer_is_refused_in_one_line(small, fault):
    assert GlmTokenizer.load(small).encode("the the") == [257, 258]
    damage, message = FAULTS[fault]
    damage(small)
    with pytest.raises(InputError, match=message) as caught:
        GlmTokenizer.load(small)
    assert "\n" not in str(caught.value)
    assert "small" in str(caught.value)


@hypothesis.settings(max_examples=60, suppress_health_check=SHARED)
@hypothesis.given(position=st.integers(0, 2000), patch=st.binary(min_size=1, max_size=6))
def test_a_strange_tiktoken_file_never_crashes(tmp_path, position, patch):
    directory = write_tiktoken(tmp_path / "fuzz", [bytes([byte]) for byte in range(256)])
    data = bytearray((directory / "tokenizer.model").read_bytes())
    data[position : position + len(patch)] = patch
    (directory / "tokenizer.model").write_bytes(data)
    with contextlib.suppress(InputError):
        GlmTokenizer.load(directory)


def test_without_placed_specials_they_follow_the_ranks(small):
    config(added_tokens_decoder=None)(small)
    assert GlmTokenizer.load(small).id_of("<|endoftext|>") == 259


# ---- chat formats: the renderings that the published templates give ----

TALK = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]  # fmt: skip
TOOL = [
    {"role": "assistant", "metadata": "f", "content": '{"x": 1}'}, {"role": "observation", "content": "obs"}
]  # fmt: skip
EMPTY = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": ""}]
THOUGHT = [{"role": "user", "content": " U1 "}, {"role": "assistant", "content": "<think>hm</think>\n\nY "}]
START = "[gMASK]<sop>"
WITHOUT = START + "<|system|>\nS<|user|>\nU1<|assistant|>\nA1"
OPEN = WITHOUT + "<|user|>\nU2<|assistant|>"
VECTORS = [
    ("chat", TALK, True, OPEN),
    ("0414", TALK, True, OPEN),
    ("z1", TALK, True, OPEN + "\n<think>"),
    *((release, TALK[:3], False, WITHOUT) for release in ("chat", "0414", "z1")),
    ("chat", TOOL, False, START + '<|assistant|>f\n{"x": 1}<|observation|>\nobs'),
    ("0414", TOOL, False, START + '<|assistant|>f \n{"x": 1}<|observation|>\nobs'),
    ("z1", TOOL, False, START + '<|assistant|>f\n{"x": 1}<|observation|>\nobs'),
    ("chat", EMPTY, False, START + "<|user|>\nU1"),
    ("0414", EMPTY, False, START + "<|user|>\nU1<|assistant|>\n"),
    ("z1", EMPTY, False, START + "<|user|>\nU1<|assistant|>\n"),
    ("chat", THOUGHT, False, START + "<|user|>\n U1 <|assistant|>\n<think>hm</think>\n\nY "),
    ("0414", THOUGHT, False, START + "<|user|>\n U1 <|assistant|>\n<think>hm</think>\n\nY "),
    ("z1", THOUGHT, False, START + "<|user|>\nU1<|assistant|>\nY"),
]


@pytest.mark.parametrize(("release", "messages", "answer", "rendered"), VECTORS)
def test_the_published_renderings(tokenizer, release, messages, answer, rendered):
    ids = tokenizer.conversation_ids(messages, release, answer)
    assert tokenizer.decode(ids, skip_special=False) == rendered
    assert ids[:2] == [151331, 151333]
    assert ids.count(151331) == ids.count(151333) == 1
    pieces = regex.findall(r"<\|\w+\|>|\[gMASK\]|<sop>|(?:(?!<\|\w+\|>|\[gMASK\]|<sop>).)+", rendered, regex.DOTALL)
    frame = {token: tokenizer.id_of(token) for token in SPECIALS}
    assert ids == [i for p in pieces for i in ([frame[p]] if p in frame else tokenizer.encode(p))]


TOOLS = [{"type": "function", "function": {"name": "f", "description": "查询", "parameters": {}}}]
DESCRIBED = '## f\n\n{\n    "name": "f",\n    "description": "查询",\n    "parameters": {}\n}\n'
DESCRIBED += "在调用上述函数时，请使用 Json 格式表示调用的参数。"
INTRODUCED = "你是一个名为 ChatGLM 的人工智能助手。你是基于{}训练的语言模型 GLM-4 模型开发的，"
INTRODUCED += "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n"


@pytest.mark.parametrize(
    ("release", "system"),
    [
        ("chat", INTRODUCED.format("智谱AI") + DESCRIBED),
        ("0414", "# 可用工具\n\n" + DESCRIBED),
        ("z1", INTRODUCED.format("智谱 AI 公司") + DESCRIBED),
    ],
)
def test_tools_stand_where_each_release_looks_for_them(tokenizer, release, system):
    user = {"role": "user", "content": "U"}
    with_tools = [{"role": "system", "content": "", "tools": TOOLS}, user]
    rendered = START + f"<|system|>\n{system}<|user|>\nU"
    right, wrong = (with_tools, ()), ([user], TOOLS)
    ignored = START + "<|user|>\nU"
    if release != "chat":
        right, wrong = wrong, right
        ignored = START + "<|system|>\n<|user|>\nU"
    ids = tokenizer.conversation_ids(right[0], release, False, right[1])
    assert tokenizer.decode(ids, skip_special=False) == rendered
    assert [i for i in ids if i in tokenizer.special_ids] == [151331, 151333, 151335, 151336]
    with pytest.warns(ToolsIgnoredWarning, match=f"'{release}' ignores tools in"):
        ids = tokenizer.conversation_ids(wrong[0], release, False, wrong[1])
    assert tokenizer.decode(ids, skip_special=False) == ignored


@pytest.mark.parametrize(
    ("messages", "release", "reason"),
    [
        (TALK, "chatglm3", "chat format 'chatglm3' is not one of chat, 0414, z1"),
        ([{"role": "system", "content": "S", "tools": "[]"}], "chat", r"a function with a name, found '\[\]'"),
        ([{"role": "system", "tools": [{"type": "python"}]}], "chat", "a function with a name, found .*python"),
        ([{"role": "bot", "content": "x"}], "0414", "unknown role 'bot'"),
    ],
)
def test_what_no_release_renders_is_refused(tokenizer, messages, release, reason):
    with pytest.raises(InputError, match=reason):
        tokenizer.conversation_ids(messages, release)
