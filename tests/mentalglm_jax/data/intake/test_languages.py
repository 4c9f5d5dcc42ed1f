"""Of each post the language it is in: short ones, mixed ones, others."""

import pytest

from mentalglm_jax.data.intake.languages import told_language

TOLD = {
    "en": ("ok", "so tired", "I can't sleep", "lol omg", "😭 help", "my tattoo says 爱 and I love it", "Exam went",
           "FINE!!", "tbh idk anymore", "I feel like nobody in this house ever listens to what I am saying.",
           "https://例子.cn/页 is where I wrote it"),
    "zh": ("累", "好累啊", "emo了", "今天 deadline 好 stressed", "我们去看了 Coldplay 的演唱会", "睡不着，睡不着",
           "這週好累", "😭😭太难了", "@Tom 你在哪", "ｅｍｏ了，想哭"),
    "ja": ("今日はとても疲れた。", "もう無理かもしれない", "毎日残業で体調不良です"),
    "ko": ("오늘 너무 힘들어요",),
    "ru": ("Я очень устал сегодня",),
    "de": ("Ich kann seit Wochen nicht mehr richtig schlafen und bin sehr müde.",),
    "es": ("No puedo dormir desde hace semanas y estoy muy cansado de todo.",),
    None: ("", "😭😭", "666", "...", "@someone", "https://example.org/x"),
}  # fmt: skip


@pytest.mark.parametrize(("language", "text"), [(one, text) for one, texts in TOLD.items() for text in texts])
def test_a_post_is_told(language, text):
    assert told_language(text) == language
