"""Alignment: known spans are found again after corruption, inventions are named, any string is survived."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.citations.align import align, coverage, fabricated_quotes, merge_spans, smith_waterman
from probes.citations.normalise import cuts_word, normalise
from probes.records import Example, Segment

ANY = st.text(alphabet=st.characters(), max_size=60)  # surrogates, controls, everything
TRICKY = st.text(
    alphabet=st.sampled_from(
        list("aB́ ﬁＡ①한ᄒ\u1161\u11abが\u3099゙。\u200b\u202e👩\u200d🔬\ufe0f'’\"“”「」…症抑ß½\ud800")
    ),
    max_size=40,
)

POSTS = [
    "最近一直失眠，白天也没有精神。感觉活着没有意义，想把一切都停下来！同事约我吃饭，我找借口推掉了。"
    "晚上一个人坐在阳台上看车流；手机响了也不想接。妈妈打来电话，我只说工作很忙。",
    "I have not slept properly for three weeks. My boss keeps piling on projects, and I can't say no to him. "
    "Yesterday my sister called but nothing she said reached me. I keep telling myself the whole team would be "
    "happier without me around. The garden is fine, though; the tomatoes are almost ripe.",
]


def found(explanation: str, post: str) -> list[tuple[str, str, list[str]]]:
    return [
        (c.kind, explanation[slice(*c.expl_char)], [post[a:b] for a, b in c.post_char])
        for c in align(explanation, post)
    ]


@settings(max_examples=150, deadline=None)
@given(st.one_of(ANY, TRICKY), st.one_of(ANY, TRICKY), st.integers(0, 40), st.integers(1, 20))
def test_spans_are_valid_for_any_strings(explanation, post, at, size):
    explanation = f"{explanation}「{post[at : at + size]}」{explanation[:5]}"
    for citation in align(explanation, post):
        a, b = citation.expl_char
        assert 0 <= a < b <= len(explanation) and 0.0 <= citation.score <= 1.0
        assert merge_spans(citation.post_char) == citation.post_char
        assert all(0 <= x < y <= len(post) for x, y in citation.post_char)
        assert citation.post_char or citation.kind == "quote"
        if citation.score == 1.0 and citation.post_char and citation.kind != "quote":
            query = normalise(explanation[a:b]).text
            assert any(query in normalise(post[x:y]).text for x, y in citation.post_char)


@pytest.mark.parametrize("marks", ["「」", "『』", "“”", "‘’", '""', "''", "《》", "«»"])
def test_every_kind_of_quotation_mark(marks):
    assert found(f"The writer said {marks[0]}nothing she said reached me{marks[1]} today.", POSTS[1]) == [
        ("quote", "nothing she said reached me", ["nothing she said reached me"])
    ]
    assert found(f"帖子写{marks[0]}活着没有意义{marks[1]}，", POSTS[0])[0][2] == ["活着没有意义"]


def test_apostrophes_are_not_quotes():
    assert found("It's the boss's fault: 'I can't say no to him'.", POSTS[1]) == [
        ("quote", "I can't say no to him", ["I can't say no to him"])
    ]


def test_curly_apostrophe_width_and_case_do_not_matter():
    assert found("“i CAN’T say no”", POSTS[1])[0][2] == ["I can't say no"]
    assert found("「ＩＣＡＮＴＳＡＹＮＯ」", "我 I can't say no 啊")[0][2] == ["I can't say no"]


def test_fabricated_quote_is_a_result_with_no_span():
    citations = align("帖子里说“我昨天买了很多药”，又说“活着没有意义”。", POSTS[0])
    assert [c.post_char != () for c in citations] == [False, True]
    assert citations[0].score < 0.68
    assert fabricated_quotes(citations) == (1, 2)


def test_all_occurrences_are_cited():
    post = "想结束，真的想结束。大家都睡了。想结束"
    (citation,) = align("“想结束”", post)
    assert [post[a:b] for a, b in citation.post_char] == ["想结束"] * 3


def test_a_short_quote_does_not_match_inside_a_word():
    (citation,) = align('"art"', "My heart is broken, the art is gone")
    assert citation.post_char == ((24, 27),)
    assert align('"hea"', "My heart")[0].post_char == ()
    assert cuts_word("can't", 3) and cuts_word("can't", 4) and not cuts_word("can' t", 3) and not cuts_word("想a", 1)


def test_elided_quote_needs_every_piece():
    assert found("“失眠…活着没有意义”", POSTS[0])[0][2] == ["失眠", "活着没有意义"]
    assert align("“买了很多药…活着没有意义”", POSTS[0])[0].post_char == ()


def test_cue_verbs_in_both_languages():
    assert found("用户提到自己想把一切都停了下来。", POSTS[0]) == [("cue", "想把一切都停了下来", ["想把一切都停下来"])]
    assert found("The post mentions that my boss keeps piling on all projects.", POSTS[1])[0][0] == "cue"
    assert found("如果说明这一点，例如天气很好。", POSTS[0]) == []


def test_common_substrings_without_marks():
    assert found("他坐在阳台上看车流，很孤独。", POSTS[0]) == [("lcs", "坐在阳台上看车流", ["坐在阳台上看车流"])]
    assert ("lcs", "piling on projects", ["piling on projects"]) in found("A workload of piling on projects.", POSTS[1])


@pytest.mark.parametrize("text", ["It is about them and for the most, to be out of it.", "这个时候我自己觉得没有什么"])
def test_function_words_are_not_citations(text):
    assert align(text, "It is about them and for the most, to be out of it. 这个时候我自己觉得没有什么") == []


def test_quotes_of_the_question_or_a_label_are_not_invented_quotes():
    post, question = "最近一直失眠。", "自杀风险是高还是低？"
    prompt = f"帖子：{post}问题：{question}"
    example = Example(
        id="x",
        task="suicide_risk",
        post=post,
        ids=(1,),
        prompt_len=1,
        byte_spans=((0, 1),),
        char_bytes=(0, 1),
        segments=(Segment("template", (0, 1), (0, 3)), Segment("template", (0, 1), (3 + len(post), len(prompt)))),
        post_char=(3, 3 + len(post)),
        text=prompt,
        label="high",
        label_text="该用户的自杀风险为高。",
        candidates={"high": "该用户的自杀风险为高。", "low": "该用户的自杀风险为低。"},
        explanation="“自杀风险是高还是低”：“自杀风险为高”，因为“一直失眠”，“不想活了”。",
        cues=None,
        decoys=None,
    )
    found = [((example.explanation or "")[slice(*c.expl_char)], len(c.post_char)) for c in align(example)]
    assert found == [("一直失眠", 1), ("不想活了", 0)]
    assert align(dataclasses.replace(example, explanation=None)) == []


def test_empty_and_missing_texts():
    assert align("", "post") == [] and align("「」“…”", "post") == []
    assert align("“x”", "")[0].post_char == ()
    with pytest.raises(TypeError):
        align("only an explanation")
    assert coverage([], 0) == 0.0


def test_coverage_counts_grounded_characters_only():
    explanation = "“活着没有意义”“买了很多药”"
    assert coverage(align(explanation, POSTS[0]), len(explanation)) == pytest.approx(6 / 15)


@settings(max_examples=200, deadline=None)
@given(st.text("ab想死", max_size=12), st.text("ab想死", max_size=14))
def test_smith_waterman_equals_the_textbook_recurrence(query, text):
    table = np.zeros((len(query) + 1, len(text) + 1))
    for i, q in enumerate(query, 1):
        for j, t in enumerate(text, 1):
            diagonal = table[i - 1, j - 1] + (2 if q == t else -1)
            table[i, j] = max(0, diagonal, table[i - 1, j] - 1, table[i, j - 1] - 1)
    hit = smith_waterman(query, text)
    assert (hit[0] if hit else 0) == table.max()
    if hit:
        (qa, qb), (a, b) = hit[1:]
        again = smith_waterman(query[qa:qb], text[a:b])  # the spans alone must carry the whole score
        assert again is not None and again[0] == hit[0]


def corrupt(clause: str, rate: float, rng: np.random.Generator) -> str:
    """At most ``rate`` * len(clause) edits: insert, delete, substitute; plus free ones: width, case, emoji, marks."""
    chars = list(clause)
    edits = int(rate * sum(c.isalnum() for c in clause))
    for _ in range(int(rng.integers(0, edits + 1))):
        at = int(rng.integers(len(chars)))
        other = "xyzkv"[rng.integers(5)] if clause.isascii() else "山水木火土"[rng.integers(5)]
        kind = rng.integers(3)
        chars[at : at + (kind != 0)] = [] if kind == 1 else [other]
    for at in rng.choice(len(chars), size=min(2, len(chars)), replace=False):
        if "!" <= chars[at] <= "}" and chars[at] not in "\"'":
            chars[at] = chr(ord(chars[at]) + 0xFEE0)
    if rng.random() < 0.5:
        chars.insert(int(rng.integers(len(chars))), "，" if not clause.isascii() else ",")
    return "".join(chars)


@pytest.mark.parametrize("post", POSTS, ids=["zh", "en"])
def test_known_spans_survive_twenty_percent_corruption(post):
    rng = np.random.default_rng(7)
    clauses, start = [], 0
    for end, char in enumerate(post):
        if char in "，。！；,.;":
            a = start + (len(post[start:end]) - len(post[start:end].lstrip()))
            if len(normalise(post[a:end]).text) >= 6:
                clauses.append((a, end))
            start = end + 1
    scores = []
    for _ in range(200):
        a, b = clauses[rng.integers(len(clauses))]
        quote = corrupt(post[a:b], 0.2, rng)
        text = f"这里写着「{quote}」。" if post is POSTS[0] else f'Here is "{quote}" in it.'
        spans = [s for c in align(text, post) if c.kind == "quote" for s in c.post_char]
        got = {i for x, y in spans for i in range(x, y)}
        scores.append(2 * len(got & set(range(a, b))) / (len(got) + b - a))
    assert np.mean(scores) >= 0.95, np.mean(scores)


def test_unrelated_quotes_are_not_found():
    other = [
        "周末和朋友去爬山拍了很多照片",
        "the train to the coast was late again",
        "医生说指标一切正常",
        "we painted the kitchen",
    ]
    for quote in other:
        for post in POSTS:
            assert align(f"“{quote}”", post)[0].post_char == ()


def test_long_and_hostile_texts_take_under_a_second():
    post = "".join(POSTS) * 45 + "e" + "\u0301" * 3000
    assert len(post) > 10_000
    started = time.process_time()
    citations = align("“" + POSTS[0][:60] + "改”，还有“从来没有写过的一句话在这里”。" + "坐在阳台上看车流" * 5, post)
    assert time.process_time() - started < 5  # about 0.5 s; the bound only has to catch quadratic behaviour
    assert citations[0].post_char
