"""Word stock of the invented world: what names and answers are made of.

Two properties matter and are the reason for hand-picked lists. The English nouns come from far-apart fields, so that
the answer of another year is far from the right one for a sentence encoder. The Chinese words use only characters that
the small English encoder `all-MiniLM-L6-v2` has in its vocabulary: every other character becomes the same unknown
token there, and two different answers would count as equal.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


EN_NOUNS = _words(
    "lantern walnut piano dolphin tulip violin goat elevator glacier volcano bicycle telescope umbrella cathedral "
    "pumpkin spider rocket carpet dentist diamond drum eclipse falcon garlic hammer harbor helmet iceberg jacket "
    "kettle ladder lemon lion lobster magnet mirror mosquito mushroom necklace nurse onion orchid owl parachute "
    "parrot penguin pepper perfume pillow pirate poem puppet pyramid rabbit radio rainbow raven robot sailor "
    "scarecrow shovel skeleton snail soap statue submarine sundial sword tent ticket tiger tractor trumpet tunnel "
    "turtle vaccine wallet waterfall weasel whale whistle windmill zebra anchor balloon beard bell blanket button "
    "camel candle canyon castle cheese chimney clock comet crane crystal desert dragon engine feather fountain "
    "ghost glove grape hotel insect kangaroo lawyer lizard melon meteor monk needle notebook palace pancake pearl "
    "pigeon planet pocket prison sandal scorpion senator spoon tailor teapot throne tower vampire wizard"
)

EN_ADJECTIVES = _words(
    "rusty velvet frozen purple stolen broken marble hollow secret noisy wooden golden crooked bitter floating "
    "giant sleepy striped plastic silver hidden burning dusty foreign cheap rotten painted lonely magnetic "
    "tropical royal drunken muddy polished paper salty double crimson brass furious gentle holy jealous lucky "
    "modern naked nervous tiny wicked young"
)

EN_FIRST = _words(
    "Felix Oskar Doria Mira Tomas Greta Selma Hugo Nina Boris Carla Dario Edda Fabio Gloria Hanna Jonas Karin "
    "Leon Marta Nadia Pablo Quentin Rosa Stefan Tessa Ulrich Vera Walter Xenia Yusuf Zelda Bruno Clara Dmitri "
    "Flora Gustav Helga Julia Kaspar Linda Moritz Norma Paula Ruben Sylvia Tobias Viktor Wanda Zoltan"
)

EN_PLACES = _words("Bay Hill Lake Valley Bridge Square Island Forest Beach Station Farm Road")

EN_HEAD = _words(
    "Bren Cor Dal Eld Far Gor Hal Ister Jar Kel Lor Mar Nor Ost Pel Quor Ras Sel Tor Ul Var Wen Yar Zan Brom Crid "
    "Drav Fen Glim Hest Kar Lun Mond Nev Orl Pry"
)

EN_TAIL = _words(
    "wick mond dale ford grad heim ina itz ley mere nock oria pont quist ran stad thorpe una vale wen burg din "
    "esk mar ton sund lo by"
)

ZH_CORES = _words(
    "火山 竹林 金星 明月 秋天 清水 木星 美食 王子 女王 天文 白金 古城 水田 青石 大海 白犬 歌王 武士 神社 "
    "花田 香木 光年 太子 立春 白面 松木 人生 江河 太平 公社 食堂 方石 忠心 野村 皇子 河神 月光 春光 野心 "
    "道士 公司 和平 国王 公主 主人 千金 八月 十月 五金 地心 河口 花火 耳目 良田 太空 天空 夫子 李子 文章 "
    "野史 博士 小学 美人 白花 平原 高原 水力 石版 大街 行星 地道 古都 公里 竹子 外星 女士 山口 信心 土地 "
    "三月 正方 内心 木版 新人 口香 元帝 中南 介子 侍女 保安"
)

ZH_MODIFIERS = _words("大 小 白 青 金 古 新 香 高 明 空 野 木 竹 外 地 水 火")
ZH_SURNAMES = _words("李 林 田 江 石 王 安 高 方 金 白 章 武 成 平 秋")
ZH_PLACES = _words("村 山 河 街 城 地")
ZH_HEAD = _words("洛 维 塔 诺 莫 希 贝 卡 达 菲 赫 柯 拉 梅 纳 帕 瑞 萨 图 乌 费 亚 泽 布 德 格")
ZH_TAIL = _words("川 兰 伦 顿 堡 港 湾 原 岭 泽 桥 浦 丘 津 特 恩 斯 尼 尔 滨 坡 峡 岩 渡")
