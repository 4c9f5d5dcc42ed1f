"""Quotes that turn what they quote, and marks that quote nothing."""

import time

import pytest

from probes.checks.crosscheck import examine
from probes.citations.align import align, fabricated_quotes, turned_quotes
from probes.citations.claims import term, turned
from probes.validation.corrupt import marks, polarity, terms

POST_EN = (
    "I do not want to die. I can't stop crying at night, and I have no hope left. Not only tired, I am alone. "
    "Some days I really want to sleep. Nothing helps."
)
POST_ZH = "我不想死，晚上没有胃口。他们从不接我的电话！我想不想活，不知道。不但累，而且烦。真的忍不住哭。"


def found(quote: str, post: str) -> bool:
    text = f"帖子提到“{quote}”。" if post is POST_ZH else f'They wrote "{quote}".'
    (citation,) = [c for c in align(text, post) if c.kind == "quote"]
    return bool(citation.post_char)


@pytest.mark.parametrize(
    ("quote", "kept"),
    [
        ("I do not want to die", True),
        ("do not want to die", True),
        ("not want to die", True),
        ("don't want to die", True),
        ("want to die", False),
        ("I want to die", False),
        ("I do want to die", False),
        ("I ... want to die", False),
        ("can't stop crying", True),
        ("I can stop crying", False),
        ("have some hope left", False),
        ("I hvae nxt hope left", False),
        ("I do nt wnat to die", True),
        ("can’t stop crying at night", True),
        ("crying at night", True),
        ("stop crying at night", False),
        ("hope left", False),
        ("no hope", True),
        ("tired, I am alone", True),
        ("want to sleep", True),
        ("I really do not want to sleep", False),
        ("Nothing helps", True),
    ],
)
def test_english_quotes_keep_their_polarity(quote: str, kept: bool) -> None:
    assert found(quote, POST_EN) == kept


@pytest.mark.parametrize(
    ("quote", "kept"),
    [
        ("我不想死", True),
        ("不想死", True),
        ("想死", False),
        ("我想死", False),
        ("我…想死", False),
        ("没有胃口", True),
        ("晚上没胃口", True),
        ("胃口", False),
        ("晚上有胃口", False),
        ("他们接我的电话", False),
        ("接我的电话", False),
        ("死", True),
        ("活", True),
        ("想活", True),
        ("累，而且烦", True),
        ("哭", True),
    ],
)
def test_chinese_quotes_keep_their_polarity(quote: str, kept: bool) -> None:
    assert found(quote, POST_ZH) == kept


@pytest.mark.parametrize(
    ("post", "lost", "kept"),
    [
        # words that nearly negate, that negate persons and things, and verbs that negate what they govern
        ("I hardly sleep since March", "I sleep since March", "hardly sleep since March"),
        ("nobody cares about what I say", "somebody cares about what I say", "nobody cares"),
        ("nothing makes me smile anymore", "makes me smile anymore", "nothing makes me smile"),
        ("none of my friends call me back", "some of my friends call me back", "none of my friends call"),
        ("I am unable to get out of bed", "I am able to get out of bed", "unable to get out of bed"),
        ("I refuse to take the pills", "I take the pills", "refuse to take the pills"),
        ("I stopped talking to my mother", "talking to my mother", "stopped talking to my mother"),
        ("I can no longer cope with work", "cope with work", "no longer cope with work"),
        ("I lack the energy to cook", "I have the energy to cook", "the energy to cook"),
        # words made of one another, what is not believed, what stands in capitals or another width
        ("I feel unhappy about my job", "happy about my job", "unhappy about my job"),
        ("I am hopeless about the future", "I am hopeful about the future", "hopeless about the future"),
        ("I do not really believe that I want to die", "I want to die", "do not really believe"),
        ("I AM ＮＯＴ OK TODAY", "I am OK today", "I am not ok today"),
        ("I am far from happy with him", "I am happy with him", "far from happy with him"),
        ("my friends call me every week", "my friends never call me every week", "my friends call me"),
        ("I trust my doctor completely", "I hardly trust my doctor completely", "trust my doctor"),
        # denied twice: said
        ("I can't stop crying at night", "I can stop crying at night", "crying at night"),
        ("我很难相信别人说的话", "我相信别人说的话", "很难相信别人"),
        ("我无法集中注意力工作", "集中注意力工作", "无法集中注意力"),
        ("没人关心我的感受", "关心我的感受", "没人关心我的感受"),
        ("我拒绝吃药和看医生", "我吃药和看医生", "拒绝吃药"),
        ("我很少和家里人说话", "我经常和家里人说话", "很少和家里人说话"),
        ("我不觉得我是抑郁症", "我是抑郁症", "不觉得我是抑郁症"),
        ("我失去了活下去的勇气", "我有了活下去的勇气", "活下去的勇气"),
        ("我並沒有放棄治療", "放弃治疗", "并没有放弃治疗"),
        ("有人关心我的感受", "没人关心我的感受", "有人关心我的感受"),
    ],
)
def test_every_kind_of_negation_is_kept(post: str, lost: str, kept: str) -> None:
    whole = f"昨天下了一场雨。{post}。楼下的邻居在做饭。" if post[-1] > "\u4e00" else f"It rained. {post}. We ate."

    def is_found(quote: str) -> bool:
        return any(c.kind == "quote" and c.post_char for c in align(f"They wrote “{quote}”.", whole))

    assert is_found(kept) and not is_found(lost)


def test_an_emoji_in_a_negation_does_not_hide_it() -> None:
    post = "so nobody💔 answers me at night"
    assert [bool(c.post_char) for c in align('"so nobo💔dy answers me" "somebody answers me"', post)] == [True, False]


def test_what_is_wished_or_able_is_denied_with_it() -> None:
    """Of more than a word: one word may only name what the post is about."""
    post = "我不想再去上班，不会游泳。I am not able to sleep."
    said = {
        quote: bool(align(f"提到“{quote}”", post)[0].post_char)
        for quote in ("再去上班", "游泳", "sleep", "able to sleep")
    }
    assert said == {"再去上班": False, "游泳": True, "sleep": True, "able to sleep": False}


def test_planted_negations_marks_and_terms() -> None:
    seed = 1
    assert min(polarity(40, seed).values()) >= 0.95
    assert min(marks(40, seed).values()) >= 0.95
    found = terms(40, seed)
    assert found["named"] <= 0.05 and found["invented"] >= 0.95


def test_a_place_that_says_it_plainly_is_enough() -> None:
    post = "I do not want to die. Yesterday I did want to die."
    (citation,) = align('They wrote "want to die".', post)
    assert [post[a:b] for a, b in citation.post_char] == ["want to die"] and citation.post_char[0][0] > 20


def test_a_turned_quote_is_counted_and_told() -> None:
    citations = align('They wrote "I want to die" and "I bought pills".', POST_EN)
    assert fabricated_quotes(citations) == (2, 2) and turned_quotes(citations) == 1
    units = [(0, len(POST_EN))]
    report = examine([], citations, example_id="x", length=len(POST_EN), units=units).report
    assert "1 of 2 quotes leave out or put in a negation" in report.notes


@pytest.mark.parametrize(
    ("explanation", "quotes"),
    [
        ("符合《贝克抑郁量表》的标准。", 0),
        ("《活着》这本书。", 0),
        ("属于“非黑即白”。", 0),
        ("体现“灾难化”的思维模式。", 0),
        ('This is a form of "emotional reasoning".', 0),
        ('The "all or nothing" pattern is clear.', 0),
        ('so-called "passive ideation"', 0),
        ("这种“反刍”式的思维。", 0),
        ("与“非黑即白”的认知歪曲一致。", 0),
        ("是一种“应该”陈述。", 0),
        ("存在“自我否定”。", 0),
        ("他在看〈背影〉。", 0),
        ('an example of "mind reading".', 0),
        ('what psychologists call "catastrophizing"', 0),
        ('Beck\'s "cognitive triad" is visible', 0),
        ("as in the book «Being Mortal»", 0),
        ("用户用“非黑即白”来形容自己。", 1),
        ("“活够了”这句话很危险。", 1),
        ("使用了“完美主义”一词。", 1),
        ('as seen in "all or nothing thinking"', 1),
        ('calls himself "a classic case"', 1),
        # what claims to be the post's, or speaks as its author does
        ("帖子写道“非黑即白”。", 1),
        ("用户说“灾难化”的思维模式。", 1),
        ("属于“我要去跳楼”。", 1),
        ('They mention "emotional reasoning".', 1),
        ('The phrase "all or nothing" pattern.', 1),
        ('a form of "I bought a rope"', 1),
        ('a form of "bought a very long rope at the market"', 1),
        ("“从来没有写过的一句话在这里”", 1),
    ],
)
def test_titles_and_terms_are_no_quotes(explanation: str, quotes: int) -> None:
    assert fabricated_quotes(align(explanation, "昨天下了雨。We had tea.")) == (quotes, quotes)


def test_a_title_that_the_post_holds_is_a_quote() -> None:
    post = "最近在看《活着》，很难过。"
    (citation,) = align("提到《活着》。", post)
    assert citation.kind == "quote" and [post[a:b] for a, b in citation.post_char] == ["活着"]


def test_hostile_quotes_take_no_time() -> None:
    post = "not want " * 2000
    began = time.process_time()
    align('"want" ' * 3000 + '"' + "not " * 3000 + '"', post)
    assert not turned("not " * 5000, post, (0, 9)) and not term('"' + "x" * 9, (1, 9))
    assert time.process_time() - began < 5
