"""The Chinese pages are complete counterparts of the English ones.

Meaning cannot be compared, but what an on-call engineer copies or acts on can: headings, commands, keys, numbers, links. A failure names
the lines of both pages: after a change to an English page, change the Chinese one there, with the terms of docs/glossary.md.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml

from tests.markdown import Block, Section, sections
from tests.metric_names import rules

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.stem for path in (ROOT / "docs" / "zh").glob("*.md"))
ENGLISH = {page: (ROOT / "docs" / f"{page}.md").read_text() for page in PAGES}
CHINESE = {page: (ROOT / "docs" / "zh" / f"{page}.md").read_text() for page in PAGES}
ALERTS = {rule["alert"] for rule in rules() if "alert" in rule}

HAN = re.compile(r"[\u4e00-\u9fff]")
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)]*)\)")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.,])\d+(?:[.,]\d+)*")
COMMENT = re.compile(r"(?:^|(?<=\s))#.*")
SENTENCE = re.compile(r"[A-Za-z][\w'-]*(?: [A-Za-z][\w'-]*){4,}")
# Chinese pages may write these numbers as digits.
WORDS = {
    "a": "1", "an": "1", "one": "1", "once": "1", "first": "1", "every": "1", "two": "2", "twice": "2", "second": "2",
    "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "sixteen": "16", "seventeen": "17", "eighteen": "18",
}  # fmt: skip
SEVERITIES = {"critical": "严重", "warning": "警告", "info": "提示"}
# Words of table cells and headings that may be without Chinese ones.
NAMES = {
    "alertname", "compose", "control", "docker", "fault", "gpu", "grafana", "host", "instance", "mountpoint", "provider", "service", "site", "supervisor", "systemd",
}  # fmt: skip


def prose(text: str) -> str:
    """Return a text without code and the targets of links."""
    return CODE.sub("", LINK.sub("]", text))


def missing(wanted: list[str], given: list[str]) -> list[str]:
    return sorted((Counter(wanted) - Counter(given)).elements())


def counterpart(target: str, page: str) -> str:
    """Return what a Chinese page links to where the English page links to `target`: a Chinese page if there is one."""
    path, _, anchor = target.partition("#")
    if "://" in target:
        return target
    linked = path.removesuffix(".md") if path else page
    if linked not in ENGLISH:
        return f"../{target}"
    anchors = {
        english.anchor: chinese.anchor
        for english, chinese in zip(sections(ENGLISH[linked]), sections(CHINESE[linked]), strict=False)
    }
    return f"{path}#{anchors.get(anchor, anchor)}" if anchor else path


def differences_of_text(english: str, chinese: str, page: str) -> Iterator[str]:
    """Yield what differs between a paragraph, a list item or a cell, and its counterpart."""
    names = CODE.findall(english), CODE.findall(chinese)
    links = [counterpart(target, page) for target in LINK.findall(english)], LINK.findall(chinese)
    numbers = NUMBER.findall(prose(english)), NUMBER.findall(prose(chinese))
    words = [WORDS[word] for word in re.findall(r"[a-z]+", prose(english).lower()) if word in WORDS]
    severities = [SEVERITIES[name] for name in re.findall(rf"\b({'|'.join(SEVERITIES)})\b", prose(english))]
    differences = {
        "names": (missing(*names), missing(names[1], names[0])),
        "links": (missing(*links), missing(links[1], links[0])),
        "numbers": (missing(*numbers), [number for number in missing(numbers[1], numbers[0]) if number not in words]),
        "severities": (missing(severities, re.findall("|".join(SEVERITIES.values()), chinese)), []),
    }
    for what, (absent, extra) in differences.items():
        if absent or extra:
            yield f"{what} that are missing: {absent}, that are only in Chinese: {extra}"
    untranslated = [] if HAN.search(chinese) else re.findall(r"[A-Za-z]{2,}", prose(chinese))
    if untranslated := [word for word in untranslated if word.lower() not in NAMES] or SENTENCE.findall(prose(chinese)):
        yield f"not translated: {untranslated}"


def differences_of_code(english: str, chinese: str) -> Iterator[str]:
    """Yield the lines of code that differ other than by their comments, which are in Chinese, or the same."""
    for line, translated in zip_longest(english.splitlines(), chinese.splitlines(), fillvalue=""):
        comment, translated_comment = COMMENT.findall(line), COMMENT.findall(translated)
        same_comment = comment == translated_comment or (comment and HAN.search("".join(translated_comment)))
        if COMMENT.sub("", line).rstrip() != COMMENT.sub("", translated).rstrip() or not same_comment:
            yield f"the line of code is {line!r} in English, and {translated!r} in Chinese"


def differences_of_blocks(english: Block, chinese: Block, page: str) -> Iterator[str]:
    if english.kind == "code":
        yield from differences_of_code(english.text, chinese.text)
    elif len(english.parts) != len(chinese.parts):
        yield f"the row has {len(english.parts)} cells in English, and {len(chinese.parts)} in Chinese"
    else:
        for part, translated in zip(english.parts, chinese.parts, strict=True):
            yield from differences_of_text(part, translated, page)


def headings_match(english: Section, chinese: Section) -> bool:
    """Return whether a heading is in Chinese, or a name that is the same in both languages, as alerts must be."""
    is_translated = bool(HAN.search(chinese.title)) or chinese.title.lower() in NAMES
    same_title = english.title == chinese.title or (is_translated and english.title not in ALERTS)
    return english.level == chinese.level and same_title


def differences_of_sections(english: Section, chinese: Section, page: str) -> Iterator[str]:
    end = Block("end of the section", english.line, ""), Block("end of the section", chinese.line, "")
    for block, translated in zip([*english.blocks, end[0]], [*chinese.blocks, end[1]], strict=False):
        place = f"docs/zh/{page}.md:{translated.line} (docs/{page}.md:{block.line}), {english.title!r}"
        if block.kind != translated.kind:
            yield f"{place}: {block.kind} in English ({block.text}), and {translated.kind} in Chinese ({translated.text})"
            return  # what follows is shifted
        for difference in differences_of_blocks(block, translated, page):
            yield f"{place}: {difference}"


def differences(english: str, chinese: str, page: str) -> list[str]:
    """Return what a Chinese page lacks or has too much, with the lines of both pages."""
    found: list[str] = []
    end = Section(0, 0, "(end of the page)")
    for section, translated in zip([*sections(english), end], [*sections(chinese), end], strict=False):
        if not headings_match(section, translated):
            places = f"docs/zh/{page}.md:{translated.line} (docs/{page}.md:{section.line})"
            titles = ["#" * each.level + " " + each.title for each in (section, translated)]
            return [*found, f"{places}: the heading is {titles[0]!r} in English, and {titles[1]!r} in Chinese"]
        found += differences_of_sections(section, translated, page)
    return found


def without_language_link(text: str) -> str:
    """Return a page without the link to its counterpart, with all lines where they were."""
    return re.sub(r"^\[(?:中文|English)\]\(\S+\)$", "", text, count=1, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_a_chinese_page_has_all_of_its_english_page(page: str) -> None:
    found = differences(without_language_link(ENGLISH[page]), without_language_link(CHINESE[page]), page)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES)
def test_pages_link_to_each_other(page: str) -> None:
    assert ENGLISH[page].splitlines()[2] == f"[中文](zh/{page}.md)"
    assert CHINESE[page].splitlines()[2] == f"[English](../{page}.md)"


def test_the_pages_that_are_needed_at_night_exist() -> None:
    assert set(PAGES) >= {"index", "getting-started", "alerts", "remediation", "console"}
    assert "(docs/zh/index.md)" in (ROOT / "README.md").read_text()


def test_the_console_page_uses_the_words_of_the_console() -> None:
    texts = yaml.safe_load((ROOT / "console" / "texts" / "zh.yaml").read_text())
    buttons = [
        texts["buttons"][name]
        for name in ("probe", "reset", "acknowledge", "maintenance", "approve", "note", "silence")
    ]
    words = [*texts["states"].values(), *buttons, texts["services"]["sort_again"], texts["services"]["filters"]]
    assert [word for word in words if word not in CHINESE["console"]] == []


PAGE = """# Title

Set `timeout` to 5 s, see [alerts](alerts.md#routing).

## HostDown

**Condition** (critical): down for two minutes.

| key | meaning |
|---|---|
| `every` | the interval |

- Run it.

```sh
defib check    # report errors
```
"""
TRANSLATED = """# 标题

将 `timeout` 设为 5 秒，见[告警](alerts.md#路由)。

## HostDown

**触发条件**（严重）：故障 2 分钟。

| 键 | 含义 |
|---|---|
| `every` | 间隔 |

- 运行它。

```sh
defib check    # 报告错误
```
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "`timeout`",
            "timeout",
            "docs/zh/x.md:3 (docs/x.md:3), 'Title': names that are missing: ['timeout'], that are only in Chinese: []",
        ),
        ("5 秒", "6 秒", "numbers that are missing: ['5'], that are only in Chinese: ['6']"),
        ("2 分钟", "3 分钟", "numbers that are missing: [], that are only in Chinese: ['3']"),
        ("严重", "警告", "severities that are missing: ['严重']"),
        (
            "(alerts.md#路由)",
            "(../alerts.md#routing)",
            "links that are missing: ['alerts.md#路由'], that are only in Chinese: ['../alerts.md#routing']",
        ),
        (
            "## HostDown",
            "## 主机故障",
            "docs/zh/x.md:5 (docs/x.md:5): the heading is '## HostDown' in English, and '## 主机故障' in Chinese",
        ),
        ("## HostDown", "### HostDown", "the heading is '## HostDown' in English, and '### HostDown' in Chinese"),
        ("```\n", "```\n\n## 路由\n", "the heading is ' (end of the page)' in English, and '## 路由' in Chinese"),
        ("- 运行它。\n", "", "item in English (Run it.), and code in Chinese"),
        ("| `every` | 间隔 |\n", "", "row in English ( `every` | the interval ), and item in Chinese (运行它。)"),
        ("| `every` | 间隔 |", "| `every` | 间隔 | |", "the row has 2 cells in English, and 3 in Chinese"),
        ("运行它。", "Run it.", "not translated: ['Run', 'it']"),
        ("运行它。", "运行 it as soon as you can。", "not translated: ['it as soon as you can']"),
        ("defib check ", "defib doctor ", "the line of code is 'defib check    # report errors' in English"),
        ("报告错误", "report errors now", "and 'defib check    # report errors now' in Chinese"),
    ],
)
def test_a_difference_is_reported_with_its_place(old: str, new: str, message: str) -> None:
    assert differences(PAGE, TRANSLATED, "x") == []
    (found,) = differences(PAGE, TRANSLATED.replace(old, new), "x")
    assert message in found
