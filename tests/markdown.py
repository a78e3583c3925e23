"""Parts of a Markdown page: its sections, and their paragraphs, list items, table rows and code blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

STARTS = [
    ("heading", re.compile(r"(#+) (.+)")),
    ("row", re.compile(r"\|(.*)\|$")),
    ("item", re.compile(r"- (.+)")),
    ("numbered item", re.compile(r"\d+\. (.+)")),
]
SEPARATOR = re.compile(r"\|[-:|]+\|$")


@dataclass
class Block:
    """A paragraph, list item, table row or code block. `line` counts from 1; `text` is without the marks of its kind."""

    kind: str
    line: int
    text: str

    @property
    def parts(self) -> list[str]:
        """The cells of a row; otherwise the whole text."""
        return [cell.strip() for cell in re.split(r"(?<!\\)\|", self.text)] if self.kind == "row" else [self.text]


@dataclass
class Section:
    line: int
    level: int
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


def sections(text: str) -> list[Section]:
    found: list[Section] = []
    for block in _blocks(text):
        if block.kind == "heading":
            marks, _, title = block.text.partition(" ")
            found.append(Section(block.line, len(marks), title))
        else:
            found[-1].blocks.append(block)
    return found


def _blocks(text: str) -> Iterator[Block]:
    block: Block | None = None
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fence, code = line.startswith("```"), block is not None and block.kind == "code"
        if block is not None and code:
            block.text += line + "\n"
            if not fence:
                continue
        started = None if fence else _start(number, line)
        if block is not None and (fence or started is not None or not line.strip()):
            yield block
            block = None
        if fence and not code:
            block = Block("code", number, line + "\n")
        elif started is not None:
            block = started
        elif line.strip() and not fence and not SEPARATOR.match(line):
            block = Block("paragraph", number, line) if block is None else block
            block.text += "" if block.line == number else " " + line.strip()


def _start(number: int, line: str) -> Block | None:
    if SEPARATOR.match(line):
        return None
    for kind, pattern in STARTS:
        if match := pattern.match(line):
            return Block(kind, number, line if kind == "heading" else match[1])
    return None
