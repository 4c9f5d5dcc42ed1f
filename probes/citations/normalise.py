"""A normalised copy of a text with index maps both ways, so that a match in the copy is a span of the original."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from probes.records import Span

# Traditional characters of everyday words and their simplified forms, so that a model that answers in the other script
# is not said to invent quotes. Character by character and many to one, which is all that matching needs.
_OLD = (
    "愛礙襖罷備貝筆畢邊變標別賓補財參殘慚蠶倉測層產長嘗償腸場廠車徹陳稱懲誠衝蟲醜處觸傳瘡創純從聰達帶單擔"
    "膽當黨島導燈敵遞點電釣調頂東動凍鬥獨讀斷隊對噸奪墮額惡兒爾發罰煩飯訪紡飛費廢紛墳奮憤瘋風鳳膚輔婦負復"
    "該蓋趕剛崗個給宮鞏溝構購夠顧穀關觀館慣廣規歸龜貴國過還漢號賀後壺護華畫話懷壞歡環緩換喚渙揮輝會穢渾貨"
    "禍獲擊機積極級擠際計記紀濟繼價駕堅監間艱檢見鍵將講獎醬膠攪腳覺較階節結潔誡緊盡進勁經驚淨競舊舉據懼捲"
    "絕軍開凱課懇誇塊虧擴來賴蘭爛懶攔勞樂淚類離禮歷麗厲勵聯連憐練戀糧兩輛療鄰臨靈領劉龍樓錄陸亂論羅邏媽馬"
    "罵買賣麥滿貓門悶們夢彌滅鳴謬難惱腦鬧內擬釀鳥寧濃農諾歐嘔盤賠噴騙貧蘋憑評潑齊騎啟氣棄遷謙錢牆強搶橋親"
    "輕傾請慶窮區軀趨權勸確讓擾熱認榮軟銳灑賽喪掃殺傷賞燒紹設審腎聲勝師濕時識實勢適釋壽書屬術樹帥雙誰說絲"
    "雖歲孫損鎖態談嘆湯題體條鐵聽頭圖團彎萬網為偉衛穩問窩無誤霧習戲細嚇顯現縣線鄉響項嘯協脅寫謝興許續選學"
    "尋訓壓鴨亞煙嚴顏驗陽養樣藥爺業葉醫遺義憶藝陰銀飲隱應營擁憂遊與語獄遠願約躍雲運雜災贊擇則贈戰張帳漲這"
    "針陣爭證織職執紙製質鐘種眾晝豬燭囑築專轉裝壯狀準濁資總縱鑽裡裏徵癒鬱慾佈佔週僅沖託註糾沒歎爲衆麼"
)
_SIMPLE = (
    "爱碍袄罢备贝笔毕边变标别宾补财参残惭蚕仓测层产长尝偿肠场厂车彻陈称惩诚冲虫丑处触传疮创纯从聪达带单担"
    "胆当党岛导灯敌递点电钓调顶东动冻斗独读断队对吨夺堕额恶儿尔发罚烦饭访纺飞费废纷坟奋愤疯风凤肤辅妇负复"
    "该盖赶刚岗个给宫巩沟构购够顾谷关观馆惯广规归龟贵国过还汉号贺后壶护华画话怀坏欢环缓换唤涣挥辉会秽浑货"
    "祸获击机积极级挤际计记纪济继价驾坚监间艰检见键将讲奖酱胶搅脚觉较阶节结洁诫紧尽进劲经惊净竞旧举据惧卷"
    "绝军开凯课恳夸块亏扩来赖兰烂懒拦劳乐泪类离礼历丽厉励联连怜练恋粮两辆疗邻临灵领刘龙楼录陆乱论罗逻妈马"
    "骂买卖麦满猫门闷们梦弥灭鸣谬难恼脑闹内拟酿鸟宁浓农诺欧呕盘赔喷骗贫苹凭评泼齐骑启气弃迁谦钱墙强抢桥亲"
    "轻倾请庆穷区躯趋权劝确让扰热认荣软锐洒赛丧扫杀伤赏烧绍设审肾声胜师湿时识实势适释寿书属术树帅双谁说丝"
    "虽岁孙损锁态谈叹汤题体条铁听头图团弯万网为伟卫稳问窝无误雾习戏细吓显现县线乡响项啸协胁写谢兴许续选学"
    "寻训压鸭亚烟严颜验阳养样药爷业叶医遗义忆艺阴银饮隐应营拥忧游与语狱远愿约跃云运杂灾赞择则赠战张帐涨这"
    "针阵争证织职执纸制质钟种众昼猪烛嘱筑专转装壮状准浊资总纵钻里里征愈郁欲布占周仅冲托注纠没叹为众么"
)
SIMPLER: dict[str, str] = dict(zip(_OLD, _SIMPLE, strict=True))
_TO_SIMPLE = str.maketrans(dict(SIMPLER))

_MAX_CLUSTER = 64  # a letter under more combining marks than this is an attack on the clock, not text


def is_cjk(char: str) -> bool:
    """True for scripts written without spaces whose single characters carry meaning (Han and kana)."""
    code = ord(char)
    return (
        0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0xFF66 <= code <= 0xFF9D or 0x20000 <= code <= 0x3FFFF
    )


@dataclass(frozen=True, eq=False)
class Normalised:
    """A normalised copy of ``source``.

    Attributes:
        text: the normalised string.
        start, end: int arrays [len(text)]: the source span each normalised character came from.
        index: int array [len(source) + 1]: number of normalised characters that come from before a source position.
    """

    source: str
    text: str
    start: np.ndarray
    end: np.ndarray
    index: np.ndarray

    def to_source(self, a: int, b: int) -> Span:
        """The source span that holds normalised characters ``[a, b)``; a and b within the text, a < b."""
        return int(self.start[a]), int(self.end[b - 1])

    def from_source(self, a: int, b: int) -> Span:
        """The normalised span of the characters that come from source ``[a, b)``; empty when all were dropped."""
        return int(self.index[a]), int(self.index[b])

    def splits(self, i: int) -> bool:
        """True when a cut before normalised character ``i`` falls inside one source cluster (ß -> ss)."""
        return 0 < i < len(self.text) and bool(self.start[i] == self.start[i - 1])


def _dropped(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "PZC" or category == "Sk" or char in "~∼" or 0xFE00 <= ord(char) <= 0xFE0F


def _clusters(text: str) -> Iterable[Span]:
    """Cuts ``text`` where NFKC never merges across the cut, so that normalising the pieces normalises the whole."""
    start = 0
    for position in range(1, len(text)):
        char = text[position]
        if not (ord(char) < 0x300 or 0x3400 <= ord(char) <= 0x9FFF):  # these never join what stands before them
            head = text[start:position]
            joined = unicodedata.normalize("NFKC", head + char)
            apart = unicodedata.normalize("NFKC", head) + unicodedata.normalize("NFKC", char)
            if (unicodedata.combining(char) or joined != apart) and len(head) < _MAX_CLUSTER:
                continue
        yield start, position
        start = position
    if text:
        yield start, len(text)


def normalise(text: str) -> Normalised:
    """NFKC, casefold, traditional to simplified characters; punctuation, separators, controls and variation selectors
    are dropped; with index maps both ways.

    Any Python string is accepted, lone surrogates included. Symbols (emoji, ``%``) are kept.
    """
    pieces: list[str] = []
    start: list[int] = []
    end: list[int] = []
    index = np.zeros(len(text) + 1, dtype=np.int64)
    for a, b in _clusters(text):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[a:b]).casefold())
        kept = "".join(char for char in folded if not _dropped(char)).translate(_TO_SIMPLE)
        index[a + 1 : b] = len(start)  # a position inside a cluster counts only what comes before the cluster
        pieces.append(kept)
        start.extend([a] * len(kept))
        end.extend([b] * len(kept))
        index[b] = len(start)
    return Normalised(text, "".join(pieces), np.array(start, np.int64), np.array(end, np.int64), index)


def is_letter(char: str) -> bool:
    """A letter or digit of a script whose words are delimited by spaces."""
    return char.isalnum() and not is_cjk(char)


def cuts_word(text: str, position: int) -> bool:
    """True when ``position`` lies inside a space-delimited word of ``text``, apostrophes between letters included."""
    if not 0 < position < len(text):
        return False
    before, after = text[position - 1], text[position]
    if is_letter(before) and is_letter(after):
        return True
    if after in "'’" and position + 1 < len(text):
        return is_letter(before) and is_letter(text[position + 1])
    if before in "'’" and position > 1:
        return is_letter(text[position - 2]) and is_letter(after)
    return False
