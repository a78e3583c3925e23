"""Commands that pages of the documentation show: code blocks of shells, and commands between backquotes in the text."""

import itertools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SHELLS = ("sh", "bash", "console", "shell")
CODE = re.compile(r"`([^`\n]+)`")
# The first words of what is a command if more words follow.
PROGRAMS = (
    r"sudo|defib|\.venv/bin/\w+|deploy/\w+\.sh|make|docker|systemctl|journalctl|supervisorctl|kill|chmod|chown|rm|du|df|curl|git"
    r"|openssl|ssh-keygen|nvidia-smi|python3?|ufw"
)
# With variables before it, or a line of cron's tables.
COMMAND = re.compile(rf"(?:{PROGRAMS}) \S|(?:[A-Z_]+=\S+ )+(?:{PROGRAMS})|(?:[\d*]+ ){{5}}\w+ /\S+ ")
FRAGMENT = re.compile(r"(?:chmod|chown) \S+$")  # without a file


@dataclass(frozen=True)
class Shown:
    """A command in the text, or a block of them, of the page at `place`: file and line."""

    place: str
    text: str
    is_block: bool = False

    @property
    def key(self) -> str:
        """The command, or the first line of the block without its comment: what identifies it in tables."""
        return re.sub(r"\s+# .*", "", self.text.splitlines()[0])


def commands_of(file: str, text: str) -> list[Shown]:
    """Return what a page shows, in its order."""
    found = [
        Shown(f"{file}:{_line(text, fence.start()) + 1}", textwrap.dedent(fence[3]).removesuffix("\n"), is_block=True)
        for fence in FENCE.finditer(text)
        if fence[2] in SHELLS
    ]
    prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    found += (
        Shown(f"{file}:{_line(prose, code.start())}", code[1].replace("\\|", "|"))
        for code in CODE.finditer(prose)
        if COMMAND.match(code[1]) and not FRAGMENT.match(code[1])
    )
    return sorted(found, key=lambda each: int(each.place.rpartition(":")[2]))


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def variants(command: str) -> list[str]:
    """Write out what may be left out, and choices: `defib x [ID]`, `defib x a|b NAME`, `defib x [on|off]`."""
    return list(
        dict.fromkeys(" ".join(words).replace("  ", " ").strip() for words in itertools.product(*_parts(command)))
    )


def _parts(command: str) -> Iterator[list[str]]:
    for part in re.findall(r"\[[^]]*\]|\"[^\"]*\"|'[^']*'|[^\s[]+", command):
        if part.startswith("["):
            yield ["", *part[1:-1].split("|")]
        else:
            yield part.split("|") if re.fullmatch(r"\w+(\|\w+)+", part) else [part]


def placeholders(command: str) -> list[str]:
    """Return words in capitals, which stand for something else; not those in quotes, and no names of variables and signals."""
    plain = re.sub(r"\"[^\"]*\"|'[^']*'|\$\w+|\w+=|-HUP", "", command)
    return re.findall(r"(?<![\w/.-])[A-Z]{2,}(?![\w.-])", plain)
