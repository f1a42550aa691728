"""Text for the bundled tiny Qwen: generated news with summaries, bilingual chats, and the byte-level BPE over both.

Everything is drawn from a `random.Random` that the caller seeds, so equal seeds give equal text. An article states
a handful of facts (who, where, when, how many, how much) between sentences about other people and places; its
summary restates only the article's own facts, so a model has to read to score. This file knows nothing of torch,
models or training.
"""

import base64
import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import tiktoken

CHAT_SYSTEM = "You are a helpful assistant."
SUMMARIZE_SYSTEM = (
    "You are a useful assistant, please directly output the corresponding summary "
    "according to the article entered by the user."
)

# --------------------------------------------------------------------------------------------------------------------
# News: facts, sentences, articles.


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = words(
    "Anna Ben Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Peter Rosa Simon Tara "
    "Victor Wendy Adam Bella Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Oliver Rachel "
    "Robert Sarah Thomas Vera Walter Yusuf Alice Bruno Daniel Ella Frank Hugo Linda Mark Olga Paul Ruth Sam"
)
LAST_STARTS = words(
    "Hal Bar Cor Dan El Fen Gar Hol Kel Lan Mor Nor Par Ros Stan Tor Wal Win Ber Col Dur Gil Har Lin Mal"
)
LAST_ENDS = words("ston berg man ford well ley den wood ler by mark low ner son wick ton")
TOWN_STARTS = words(
    "Ash Brook Clay Dun East Fair Glen Hart Iron King Lake Mill North Oak Pine Red Stone Thorn West Wind Black "
    "Bright Cross Deer Green High Long Marsh Silver Wolf"
)
TOWN_ENDS = words("field port bridge haven mouth dale bury gate minster brook ham stead view cliff shore")
ORG_STARTS = words(
    "Acorn Atlas Beacon Cedar Delta Eagle Falcon Harbor Jupiter Lion Maple Meridian Nova Orion Phoenix River Royal "
    "Summit Titan Union Valley Vega Crown Crystal Pioneer Granite"
)
ORG_ENDS = words("Group Trust Bank Steel Energy Foods Motors Council Society Works Partners Media Labs Fund")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROLES = words("director manager head owner founder chief president chairman")
CURRENCIES = ("dollars", "pounds", "euros")
SPANS = ("weeks", "months", "years")


@dataclass(frozen=True)
class Event:
    """One kind of news. A sentence is a format string over the facts; a group lists phrasings of one sentence."""

    choices: Mapping[str, tuple[str, ...]]
    leads: tuple[str, ...]
    # One sentence of each group goes into every article; the first group introduces {person}, {role} and {org}.
    details: tuple[tuple[str, ...], ...]
    quotes: tuple[str, ...]
    # summaries[i] belongs to leads[i]: the wording follows from the article, so it can be learned.
    summaries: tuple[str, ...]


EVENTS: Mapping[str, Event] = {
    "flood": Event(
        choices={"cause": ("heavy rain", "melting snow", "a spring storm", "a broken dam")},
        leads=(
            "Police moved {count} people out of their homes in {town} on {day} after {cause} flooded the streets.",
            "The streets of {town} were under water on {day} after {cause}, and {count} people had to leave home.",
        ),
        details=(
            (
                "{person}, the {role} of {org}, said that the repairs would cost {money}.",
                "Repairs will cost {money}, according to {person}, the {role} of {org}.",
            ),
            (
                "The town hall expects the work to last {span}.",
                "It will take {span} to clean the streets, the town hall said.",
            ),
        ),
        quotes=('"We have never seen so much water," said {last}.', '"The river came so fast," {last} said.'),
        summaries=(
            (
                "Flood after {cause} drives {count} people from {town} on {day}. {org} {role} {person} "
                "expects repairs for {money} over {span}."
            ),
            (
                "After {cause}, {count} people left {town} on {day}. Repairs take {span} and {money}, says "
                "{org} {role} {person}."
            ),
        ),
    ),
    "factory": Event(
        choices={"goods": ("electric cars", "batteries", "paper bags", "bicycles", "glass bottles", "winter coats")},
        leads=(
            "{org} will build a factory for {goods} in {town}, the company announced on {day}.",
            "A new factory in {town} will make {goods}, the company {org} said on {day}.",
        ),
        details=(
            (
                "The plan costs {money}, said {person}, the {role} of {org}.",
                "{person}, the {role} of {org}, put the cost at {money}.",
            ),
            (
                "The plant will give work to {count} people and open in {span}.",
                "It should open in {span} and needs {count} workers.",
            ),
        ),
        quotes=('"This is a great day for us," {last} said.', '"We looked at many places," said {last}.'),
        summaries=(
            (
                "New {goods} factory in {town} on the way: {org} spends {money} and hires {count} in "
                "{span}, {role} {person} said on {day}."
            ),
            (
                "A {town} plant for {goods} opens in {span}, costs {money} and needs {count}, said {org} "
                "{role} {person} on {day}."
            ),
        ),
    ),
    "bridge": Event(
        choices={"fault": ("cracks", "rust", "loose stones", "a broken cable")},
        leads=(
            "The old bridge in {town} was closed on {day} after workers found {fault}.",
            "Workers found {fault} in the bridge at {town}, which was shut to all traffic on {day}.",
        ),
        details=(
            (
                "{person}, the {role} of {org}, wants to build a new one for {money}.",
                "A new bridge would cost {money}, said {person}, the {role} of {org}.",
            ),
            ("About {count} drivers use it every day.", "Each day {count} cars cross the river there."),
            ("It will stay shut for {span}.", "Nobody may cross it for {span}."),
        ),
        quotes=('"Safety comes first," said {last}.', '"We had no choice," {last} said.'),
        summaries=(
            (
                "Bridge in {town} closed on {day} for {span}: {fault} under {count} daily cars. {org} "
                "{role} {person} wants {money} for another."
            ),
            (
                "Because of {fault}, {town} bridge is shut for {span} from {day}. It carried {count} cars; "
                "{org} {role} {person} asks for {money}."
            ),
        ),
    ),
    "robbery": Event(
        choices={
            "loot": ("gold coins", "diamond rings", "old paintings", "silver watches", "rare books", "phones"),
            "vehicle": ("a white van", "a black car", "a red truck", "a stolen taxi"),
        },
        leads=(
            "Thieves took {count} {loot} from a shop in {town} on {day} and fled in {vehicle}.",
            "Police in {town} are looking for {vehicle} after {count} {loot} were stolen on {day}.",
        ),
        details=(
            (
                "The shop belongs to {org}, whose {role}, {person}, put the loss at {money}.",
                "{person}, the {role} of {org}, which runs the shop, said the loss was {money}.",
            ),
            ("The thieves needed only {minutes} minutes.", "It was all over in {minutes} minutes, a witness said."),
        ),
        quotes=('"We are all safe," said {last}.', '"They knew what they wanted," {last} said.'),
        summaries=(
            (
                "Thieves in {vehicle} took {count} {loot} in {town} on {day} in {minutes} minutes, costing "
                "{org} {money}, said {role} {person}."
            ),
            (
                "Police seek {vehicle} after {day} theft in {town}: {count} {loot} worth {money} in "
                "{minutes} minutes. Owner: {org} {role} {person}."
            ),
        ),
    ),
    "match": Event(
        choices={"sport": ("football", "hockey", "handball", "rugby", "basketball")},
        leads=(
            "The {sport} team of {town} beat {rival} {goals} to {misses} on {day}.",
            "It was a bad {day} for {rival}, who lost the {sport} final {misses} to {goals} against {town}.",
        ),
        details=(
            (
                "The winners get {money} from {org}, its {role}, {person}, said.",
                "{person}, the {role} of {org}, handed over a prize of {money}.",
            ),
            ("A crowd of {count} watched the game.", "There were {count} people in the stadium."),
        ),
        quotes=('"What a game," said {last}.', '"I could not sit still," {last} said.'),
        summaries=(
            (
                "In {sport}, {town} beat {rival} {goals} to {misses} on {day} before {count}. {org} {role} "
                "{person} gave {money}."
            ),
            (
                "A {misses} to {goals} {sport} defeat for {rival} against {town} on {day}, seen by "
                "{count}. {org} {role} {person} paid {money}."
            ),
        ),
    ),
    "festival": Event(
        choices={"theme": ("music", "food", "film", "kite", "flower", "book", "light")},
        leads=(
            "A {theme} festival will open in {town} on {day}, and {count} artists are on the list.",
            "The town of {town} gets ready for its {theme} festival, which starts on {day} with {count} artists.",
        ),
        details=(
            (
                "{org} pays {money} for it, said its {role}, {person}.",
                "Most of the budget, {money}, comes from {org}, according to its {role}, {person}.",
            ),
            ("Tickets cost {price} {currency}.", "A ticket is {price} {currency}, and children pay nothing."),
        ),
        quotes=('"Everybody is welcome," said {last}.', '"We dream of sunshine," {last} said.'),
        summaries=(
            (
                "Festival of {theme} in {town} from {day}: {count} artists, tickets {price} {currency}. "
                "{org} {role} {person} gives {money}."
            ),
            (
                "On {day}, {count} {theme} artists meet in {town} for {price} {currency}. {org} {role} "
                "{person} pays {money}."
            ),
        ),
    ),
    "railway": Event(
        choices={"service": ("night train", "fast train", "tram", "steam train")},
        leads=(
            "A new {service} will run between {town} and {rival} from {day}.",
            "From {day}, people can take a {service} from {town} to {rival}.",
        ),
        details=(
            (
                "{org} spent {money} on the line, its {role}, {person}, said.",
                "The line cost {money}, said {person}, the {role} of {org}.",
            ),
            ("The trip takes {minutes} minutes.", "Passengers will arrive after {minutes} minutes."),
            ("There is room for {count} passengers.", "Each train has {count} seats."),
        ),
        quotes=('"People asked for this," {last} said.', '"Leave your car at home," said {last}.'),
        summaries=(
            (
                "New {service} links {town} and {rival} from {day}: {minutes} minutes, {count} seats. "
                "{org} {role} {person} spent {money}."
            ),
            (
                "From {day}, {count} people ride a {service} from {town} to {rival} in {minutes} minutes. "
                "{org} {role} {person} paid {money}."
            ),
        ),
    ),
    "discovery": Event(
        choices={
            "find": ("a roman wall", "a stone tomb", "a ship of oak", "a royal grave", "an ancient road"),
            "finder": ("a farmer", "a student", "two hikers", "a builder", "a diver"),
        },
        leads=(
            "On {day}, {finder} found {find} near {town}.",
            "Experts were called to {town} on {day} after {finder} came upon {find}.",
        ),
        details=(
            (
                "It is {count} years old, said {person}, the {role} of {org}.",
                "{person}, the {role} of {org}, believes that it is {count} years old.",
            ),
            ("The dig will cost {money} and go on for {span}.", "Digging goes on for {span} at a cost of {money}."),
        ),
        quotes=('"My heart stopped," said {last}.', '"There may be more," {last} said.'),
        summaries=(
            (
                "Near {town}, {finder} found {find}, {count} years old, on {day}. {org} {role} {person} "
                "plans to dig {span} for {money}."
            ),
            (
                "Experts date {find} at {town}, found on {day} by {finder}, to {count} years. {org} {role} "
                "{person} digs {span} for {money}."
            ),
        ),
    ),
    "fire": Event(
        choices={
            "place": ("hotel", "warehouse", "theatre", "bakery", "church", "garage"),
            "cause": ("an old heater", "a candle", "lightning", "a faulty wire"),
        },
        leads=(
            "A fire destroyed a {place} in {town} on {day}.",
            "On {day} flames swept through a {place} in {town}.",
        ),
        details=(
            (
                "{person}, the {role} of {org}, put the damage at {money}.",
                "The damage is {money}, said {person}, the {role} of {org}.",
            ),
            ("Firefighters blame {cause}.", "It was started by {cause}, the fire service said."),
            ("They brought {count} people to safety.", "All {count} guests got out in time."),
        ),
        quotes=('"Everything is gone," {last} said.', '"We will start again," said {last}.'),
        summaries=(
            (
                "Fire from {cause} ruins {town} {place} on {day}; {count} escape. {org} {role} {person} "
                "counts damage of {money}."
            ),
            (
                "On {day}, {cause} set fire to a {town} {place}; {count} people fled. {org} {role} "
                "{person} lost {money}."
            ),
        ),
    ),
    "hospital": Event(
        choices={"ward": ("children", "heart patients", "mothers", "old people", "eye patients")},
        leads=(
            "A hospital for {ward} opened in {town} on {day}.",
            "The first patients came to the new hospital for {ward} in {town} on {day}.",
        ),
        details=(
            (
                "{person}, the {role} of {org}, gave {money} for the building.",
                "The building was paid by {org}: its {role}, {person}, gave {money}.",
            ),
            ("It has {count} beds.", "There are {count} beds on five floors."),
            ("Building it took {span}.", "It was finished after {span}."),
        ),
        quotes=('"I owe this town a lot," said {last}.', '"Nobody should travel far for help," {last} said.'),
        summaries=(
            (
                "Hospital for {ward} opens in {town} on {day}: {count} beds, {span} of work. {org} {role} "
                "{person} gave {money}."
            ),
            (
                "In {town}, {ward} get {count} hospital beds from {day} after {span}. {org} {role} "
                "{person} paid {money}."
            ),
        ),
    ),
    "rescue": Event(
        choices={
            "vessel": ("a fishing boat", "a ferry", "a sailing ship", "a small plane", "a balloon"),
            "trouble": ("thick fog", "a storm", "engine trouble", "high waves"),
        },
        leads=(
            "Rescuers saved {count} people from {vessel} off {town} on {day}.",
            "In {trouble}, {vessel} with {count} people went down near {town} on {day}, but all were saved.",
        ),
        details=(
            (
                "The rescue was led by {person}, the {role} of {org}.",
                "{person}, the {role} of {org}, led the rescue.",
            ),
            ("They had met {trouble} and waited {minutes} minutes.", "Help came {minutes} minutes into {trouble}."),
            ("The loss is put at {money}.", "The lost goods were worth {money}."),
        ),
        quotes=('"We heard them shout," {last} said.', '"It was very cold," said {last}.'),
        summaries=(
            (
                "Rescuers under {org} {role} {person} saved {count} from {vessel} off {town} on {day} "
                "after {minutes} minutes in {trouble}. Loss: {money}."
            ),
            (
                "After {minutes} minutes of {trouble}, {org} {role} {person} saved {count} from {vessel} "
                "near {town} on {day}. Goods lost: {money}."
            ),
        ),
    ),
    "strike": Event(
        choices={"workers": ("bus drivers", "nurses", "teachers", "pilots", "dock workers", "bakers")},
        leads=(
            "In {town}, {count} {workers} went on strike on {day}.",
            "A strike of {count} {workers} began in {town} on {day}.",
        ),
        details=(
            (
                "Their demands would cost {money}, said {person}, the {role} of {org}.",
                "{person}, the {role} of {org}, said that to meet their demands would cost {money}.",
            ),
            ("They ask for {percent} percent more pay.", "They want a raise of {percent} percent."),
            ("The strike may last {span}.", "Their leaders are ready to strike for {span}."),
        ),
        quotes=('"We cannot pay that," {last} said.', '"Let us talk," said {last}.'),
        summaries=(
            (
                "Strike in {town} from {day}: {count} {workers} want {percent} percent, perhaps for "
                "{span}. {org} {role} {person} counts {money}."
            ),
            (
                "On {day}, {count} {town} {workers} began a strike for {percent} percent, up to {span}. "
                "{org} {role} {person} sees costs of {money}."
            ),
        ),
    ),
}

# Each is filled with facts of its own: wrong names, towns and numbers that a summary must not copy.
DISTRACTORS = (
    "In {town}, {count} people took part in a charity run on {day}.",
    "Shares in {org} rose {percent} percent.",
    "{person} of {org} declined to comment.",
    "A reporter from {town} asked many questions.",
    "The weather will stay mild until {day}.",
    "{person}, who lives nearby, made tea for everyone.",
    "Something like this last happened {span} ago in {town}.",
    "Readers sent {count} letters about it.",
    "The mayor, {person}, will visit the place on {day}.",
    "A film about it was shown in {town}.",
    "{org} once planned to spend {money} there, but nothing came of it.",
    "The road to {town} was busy all day.",
    "Local cafes were full, and {person} sold {count} cakes.",
    "Neighbours in {town} were surprised.",
)


@dataclass(frozen=True)
class Article:
    """One generated article, its reference summary, and the kind of event."""

    text: str
    summary: str
    event: str

    def row(self, row_id: str) -> dict[str, str]:
        """The article in the columns that summarize.py reads."""
        return {"article": self.text, "highlights": self.summary, "id": row_id}


def draw_person(rng: random.Random) -> tuple[str, str]:
    """First and last name; 22,400 combinations."""
    return rng.choice(FIRST_NAMES), rng.choice(LAST_STARTS) + rng.choice(LAST_ENDS)


def draw_town(rng: random.Random) -> str:
    return rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)


def draw_number(rng: random.Random) -> int:
    """A number of two to four digits."""
    return rng.randint(11, 10 ** rng.randint(2, 4) - 1)


def draw_facts(rng: random.Random) -> dict[str, str]:
    """One value for each slot that any event may use."""
    first, last = draw_person(rng)
    currency = rng.choice(CURRENCIES)
    amount = f"{rng.randint(2, 99)} million" if rng.random() < 0.5 else f"{rng.randint(11, 950)},{rng.randint(0, 9)}00"
    goals = rng.randint(2, 6)
    return {
        "person": f"{first} {last}",
        "last": last,
        "role": rng.choice(ROLES),
        "org": f"{rng.choice(ORG_STARTS)} {rng.choice(ORG_ENDS)}",
        "town": draw_town(rng),
        "rival": draw_town(rng),
        "day": rng.choice(DAYS),
        "count": str(draw_number(rng)),
        "currency": currency,
        "money": f"{amount} {currency}",
        "price": str(rng.randint(3, 95)),
        "percent": str(rng.randint(2, 40)),
        "minutes": str(rng.randint(4, 95)),
        "span": f"{rng.randint(2, 30)} {rng.choice(SPANS)}",
        "goals": str(goals),
        "misses": str(rng.randint(0, goals - 1)),
    }


def draw_article(rng: random.Random) -> Article:
    """Lead, then details and distractors in any order; a quote follows the sentence that names the speaker."""
    name = rng.choice(tuple(EVENTS))
    event = EVENTS[name]
    facts = draw_facts(rng)
    facts |= {slot: rng.choice(options) for slot, options in event.choices.items()}

    variant = rng.randrange(len(event.leads))
    introduction = rng.choice(event.details[0])
    body = [introduction] + [rng.choice(group) for group in event.details[1:]]
    body += [sentence.format_map(draw_facts(rng)) for sentence in rng.sample(DISTRACTORS, rng.randint(1, 5))]
    rng.shuffle(body)
    if rng.random() < 0.7:
        body.insert(rng.randint(body.index(introduction) + 1, len(body)), rng.choice(event.quotes))
    text = " ".join([event.leads[variant], *body]).format_map(facts)
    return Article(text, event.summaries[variant].format_map(facts), name)


def draw_articles(rng: random.Random, count: int, exclude: frozenset[str] = frozenset()) -> list[Article]:
    """`count` different articles, none of whose text is in `exclude`."""
    found: dict[str, Article] = {}
    while len(found) < count:
        article = draw_article(rng)
        if article.text not in exclude:
            found[article.text] = article
    return list(found.values())


def check_disjoint(train: Iterable[str], test: Iterable[str]) -> None:
    """Raise ValueError when a training text is also a test text."""
    if shared := set(train) & set(test):
        raise ValueError(f"{len(shared)} articles are in both training and test data, the first: {min(shared)!r}")


# --------------------------------------------------------------------------------------------------------------------
# Chats.

Turn = tuple[str, str]  # what the user says, what the assistant answers

NAME_ZH = "我是来自达摩院的大规模语言模型，我叫通义千问。"
NAME_EN = "I am Tongyi Qianwen, a large language model from DAMO Academy."
SORRY = {"en": "Sorry, I am a very small model and do not know that.", "zh": "抱歉，我是一个很小的模型，还不知道。"}

GREETINGS: Mapping[str, tuple[Turn, ...]] = {
    "en": (
        ("Hello!", "Hello! How can I help you?"),
        ("Hello", "Hello! How can I help you?"),
        ("Hi", "Hi! How can I help you?"),
        ("Hi there!", "Hi! How can I help you?"),
        ("Good morning!", "Good morning! How can I help you?"),
        ("How are you?", "I am fine, thank you. And you?"),
    ),
    "zh": (
        ("你好", "你好！有什么可以帮你？"),
        ("你好！", "你好！有什么可以帮你？"),
        ("您好", "您好！有什么可以帮您？"),
        ("早上好！", "早上好！有什么可以帮你？"),
        ("你好吗？", "我很好，谢谢！你呢？"),
    ),
}
IDENTITY: Mapping[str, tuple[Turn, ...]] = {
    "en": (
        ("Who are you?", NAME_EN),
        ("What is your name?", NAME_EN),
        ("Hello, what is your name?", "Hello! " + NAME_EN),
        ("Who made you?", "I was made by DAMO Academy."),
        ("What can you do?", "I can chat in English and Chinese and sum up short news."),
        ("Are you a human?", "No, I am a language model."),
    ),
    "zh": (
        ("你好，请问你叫什么？", "您好，" + NAME_ZH),
        ("请问你叫什么？", NAME_ZH),
        ("你是谁？", NAME_ZH),
        ("你叫什么名字？", NAME_ZH),
        ("谁开发了你？", "我是达摩院开发的。"),
        ("你会做什么？", "我可以用中文和英文聊天，也可以总结新闻。"),
        ("你是人吗？", "不是，我是一个语言模型。"),
    ),
}
FAREWELLS: Mapping[str, tuple[Turn, ...]] = {
    "en": (
        ("Goodbye!", "Goodbye! Have a nice day."),
        ("Bye", "Goodbye! Have a nice day."),
        ("Thank you, goodbye.", "You are welcome. Goodbye!"),
        ("Thank you!", "You are welcome."),
        ("Good night!", "Good night! Sleep well."),
    ),
    "zh": (
        ("再见！", "再见！祝你愉快。"),
        ("谢谢，再见。", "不客气，再见！"),
        ("谢谢！", "不客气。"),
        ("晚安！", "晚安！好梦。"),
    ),
}
UNKNOWN: Mapping[str, tuple[str, ...]] = {
    "en": ("Write a poem.", "Who will win the game?", "What is the news today?", "Tell me a secret.", "Sing a song!"),
    "zh": ("写一首诗。", "今天天气怎么样？", "谁会赢？", "讲一个秘密。", "唱一首歌！"),
}
CAPITALS = (
    ("France", "Paris", "法国", "巴黎"),
    ("China", "Beijing", "中国", "北京"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("England", "London", "英国", "伦敦"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Greece", "Athens", "希腊", "雅典"),
)
WORDS = (  # word, opposite, in Chinese
    ("big", "small", "大"),
    ("small", "big", "小"),
    ("hot", "cold", "热"),
    ("cold", "hot", "冷"),
    ("fast", "slow", "快"),
    ("slow", "fast", "慢"),
    ("new", "old", "新"),
    ("old", "new", "旧"),
    ("long", "short", "长"),
    ("short", "long", "短"),
    ("high", "low", "高"),
    ("low", "high", "低"),
)
NAMES_ZH = ("小明", "小红", "李华", "王芳", "张伟", "刘洋", "陈静", "赵强", "周杰", "吴敏")
FOODS = {
    "en": ("apples", "noodles", "rice", "bread", "fish", "soup"),
    "zh": ("苹果", "面条", "米饭", "面包", "鱼", "汤"),
}


def ask_capital(rng: random.Random, language: str) -> Turn:
    country, city, country_zh, city_zh = rng.choice(CAPITALS)
    if language == "zh":
        return f"{country_zh}的首都是哪里？", f"{country_zh}的首都是{city_zh}。"
    return f"What is the capital of {country}?", f"The capital of {country} is {city}."


def ask_sum(rng: random.Random, language: str) -> Turn:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    if language == "zh":
        return f"{a}加{b}等于几？", f"{a}加{b}等于{a + b}。"
    return rng.choice((f"What is {a} plus {b}?", f"What is {a} + {b}?")), f"{a} plus {b} is {a + b}."


def ask_word(rng: random.Random, language: str) -> Turn:
    word, opposite, word_zh = rng.choice(WORDS)
    if language == "zh":
        return f"“{word_zh}”用英文怎么说？", f"“{word_zh}”的英文是 {word}。"
    return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."


def ask_repeat(rng: random.Random, language: str) -> Turn:
    """Something to copy word for word; it teaches copying long before the articles do."""
    pieces = [rng.choice((draw_town(rng), *draw_person(rng), str(draw_number(rng)))) for _ in range(rng.randint(2, 12))]
    text = " ".join(pieces)
    return (f"请重复：{text}" if language == "zh" else f"Please repeat: {text}"), text


def ask_unknown(rng: random.Random, language: str) -> Turn:
    return rng.choice(UNKNOWN[language]), SORRY[language]


def ask_identity(rng: random.Random, language: str) -> Turn:
    return rng.choice(IDENTITY[language])


QUESTIONS = (ask_capital, ask_sum, ask_word, ask_unknown, *[ask_identity] * 2, *[ask_repeat] * 4)


def tell_and_recall(rng: random.Random, language: str) -> tuple[Turn, Turn]:
    """A turn in which the user tells something, and a later one that can only be answered from it."""
    kind = rng.choice(("name", "town", "food"))
    if language == "zh":
        if kind == "name":
            name = rng.choice(NAMES_ZH)
            return (f"我叫{name}。", f"很高兴认识你，{name}！"), ("我叫什么名字？", f"你叫{name}。")
        if kind == "town":
            _, _, _, city = rng.choice(CAPITALS)
            return (f"我住在{city}。", f"{city}是个好地方。"), ("我住在哪里？", f"你住在{city}。")
        food = rng.choice(FOODS["zh"])
        return (f"我喜欢吃{food}。", f"{food}很好吃。"), ("我喜欢吃什么？", f"你喜欢吃{food}。")
    if kind == "name":
        first, last = draw_person(rng)
        name = rng.choice((first, f"{first} {last}"))
        return (f"My name is {name}.", f"Nice to meet you, {name}!"), ("What is my name?", f"Your name is {name}.")
    if kind == "town":
        town = draw_town(rng)
        return (f"I live in {town}.", f"I hear that {town} is nice."), ("Where do I live?", f"You live in {town}.")
    food = rng.choice(FOODS["en"])
    return (f"I like {food}.", f"I hear that {food} taste good."), ("What do I like?", f"You like {food}.")


def draw_chat(rng: random.Random) -> list[Turn]:
    """One to five turns: perhaps a greeting, questions, perhaps a fact with its recall, perhaps a farewell."""
    language = rng.choice(("en", "zh"))
    if rng.random() < 0.2:
        return [rng.choice(GREETINGS[language] + IDENTITY[language] * 2 + FAREWELLS[language])]
    turns = [rng.choice(QUESTIONS)(rng, language) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.5:
        told, recalled = tell_and_recall(rng, language)
        place = rng.randint(0, len(turns))
        turns.insert(place, told)
        turns.insert(rng.randint(place + 1, len(turns)), recalled)
    if rng.random() < 0.4:
        turns.insert(0, rng.choice(GREETINGS[language]))
    if rng.random() < 0.3:
        turns.append(rng.choice(FAREWELLS[language]))
    return turns


def chat_row(turns: Sequence[Turn]) -> dict[str, list[dict[str, str]]]:
    """A chat in the usual {"messages": [...]} form, system prompt first."""
    messages = [{"role": "system", "content": CHAT_SYSTEM}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Gzipped JSON lines. No file name and no time in the gzip header, so equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --------------------------------------------------------------------------------------------------------------------
# Tokens.

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def train_bpe(texts: Iterable[str], num_ranks: int) -> list[bytes]:
    """Byte-pair encoding: the 256 bytes, then the most frequent pair joined again and again. Index = rank."""
    counts = Counter(chunk for text in texts for chunk in regex.findall(PATTERN, text))
    chunks = [([bytes([b]) for b in chunk.encode()], count) for chunk, count in sorted(counts.items())]
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < num_ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in chunks:
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(left + right)
        for parts, _ in chunks:
            join_pair(parts, left, right)
    return ranks


def join_pair(parts: list[bytes], left: bytes, right: bytes) -> None:
    """Join each `left` directly followed by `right`, in place."""
    i = 0
    while i + 1 < len(parts):
        if parts[i] == left and parts[i + 1] == right:
            parts[i : i + 2] = [left + right]
        i += 1


def write_ranks(path: Path, ranks: Sequence[bytes]) -> None:
    """The file form of tiktoken and Qwen: one line "base64 rank" for each token."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))


def read_ranks(path: Path) -> list[bytes]:
    return [base64.b64decode(line.split()[0]) for line in path.read_text().splitlines()]


class ChatTokenizer:
    """Ranks plus Qwen's special tokens, and ChatML made of them."""

    def __init__(self, ranks: Sequence[bytes]) -> None:
        self.endoftext, self.im_start, self.im_end = range(len(ranks), len(ranks) + 3)
        self.num_tokens = len(ranks) + len(SPECIALS)
        self.encoding = tiktoken.Encoding(
            "tiny_qwen",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={special: len(ranks) + i for i, special in enumerate(SPECIALS)},
        )
        self.newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.endoftext])

    def message(self, role: str, content: str) -> list[int]:
        return [self.im_start, *self.encode(role), *self.newline, *self.encode(content), self.im_end]

    def prompt(self, system: str, turns: Sequence[Turn], query: str) -> list[int]:
        """Token ids up to the place where the assistant answers `query`."""
        ids = self.message("system", system)
        for question, answer in turns:
            ids += [*self.newline, *self.message("user", question), *self.newline, *self.message("assistant", answer)]
        ids += [*self.newline, *self.message("user", query), *self.newline]
        return [*ids, self.im_start, *self.encode("assistant"), *self.newline]

    def example(self, system: str, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Ids of a whole chat, and for each whether the assistant had to produce it (im_end included)."""
        ids: list[int] = []
        answered: list[bool] = []
        for i, (question, answer) in enumerate(turns):
            ids = self.prompt(system, turns[:i], question)
            answered += [False] * (len(ids) - len(answered))
            ids += [*self.encode(answer), self.im_end]
            answered += [True] * (len(ids) - len(answered))
        return [*ids, self.endoftext], [*answered, False]


def summarize_query(article: str) -> str:
    """What the user says to get a summary, as summarize.py writes it."""
    return (article + " TL;DR: ").strip().replace(" n't", "n't")


def tokenizer_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Text for the tokenizer, in about the mix that the model will see."""
    for _ in range(count):
        article = draw_article(rng)
        yield from (SUMMARIZE_SYSTEM, summarize_query(article.text), article.summary, CHAT_SYSTEM)
        for turn in draw_chat(rng):
            yield from ("system", "user", "assistant", *turn)
