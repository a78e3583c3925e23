"""The Jinja2 templates of cards: ours, or a user's in their place, with everything escaped that they print.

A directory of the user's own (`notify.templates`) may hold any of NAMES. There `{% include "defib/card.j2" %}` still
finds ours, and what its `words` leave out is said in ours.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import (
    ChoiceLoader,
    FileSystemLoader,
    PackageLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Language
from remediator.notifications.channels.feishu_cards import clean
from remediator.notifications.outbox import Form
from remediator.notifications.reader import State, Story

HOSTS_SHOWN = 5
NAMES = ("title.j2", "card.j2", "group.j2", "summary.j2", "en.j2", "zh.j2")
_ENTITIES = {character: f"&#{ord(character)};" for character in "*<>[]()\\_~`&"}


def escape(text: str) -> str:
    """Text that shows as it is in a card: nothing in it is markup, a mention or a link."""
    return "".join(_ENTITIES.get(character, character) for character in text)


class Templates:
    """The templates of one language, as markup or as plain text."""

    def __init__(self, language: Language, own: Path | None = None) -> None:
        ours = PackageLoader("remediator.notifications")
        loaders = [FileSystemLoader(own)] if own is not None else []
        loader = ChoiceLoader([*loaders, ours, PrefixLoader({"defib": ours})])
        self._markup = self._environment(loader, markup=True)
        self._plain = self._environment(loader, markup=False)
        self.words = _merged(self._words(f"defib/{language}.j2"), self._words(f"{language}.j2"))
        for environment in (self._markup, self._plain):
            environment.globals["words"] = self.words

    def _words(self, name: str) -> Mapping[str, Any]:
        said = getattr(self._plain.get_template(name).module, "words", None)
        if not isinstance(said, dict):
            raise TemplateError(f"{name} sets no `words`")
        return said

    def _environment(self, loader: ChoiceLoader, *, markup: bool) -> SandboxedEnvironment:
        shown = escape if markup else str
        # With `autoescape`, what `finalize` has made safe is told from what it has not seen.
        environment = SandboxedEnvironment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            finalize=partial(_printed, shown),
        )  # fmt: skip
        environment.globals |= {
            "bold": _bold if markup else _plain_bold, "shared_labels": _shared_labels,
            "counted": _counted, "busiest_hosts": _busiest_hosts,
        }  # fmt: skip
        environment.filters |= {
            "time": _time, "duration": self._duration,
            "lines": partial(_lines, shown),
        }  # fmt: skip
        return environment

    def _duration(self, seconds: float) -> str:
        return duration(self.words, seconds)

    def title(self, stories: Sequence[Story], form: Form) -> str:
        said = self._plain.get_template("title.j2").render(stories=_lenient(stories), form=form)
        return clean(" ".join(said.split()), 150).replace("<", "‹")  # in a title, too, `<at …>` may call people

    def body(self, stories: Sequence[Story], form: Form, *, plain: bool = False) -> list[str]:
        """The lines of a card; those of plain text where it is `plain`."""
        environment = self._plain if plain else self._markup
        template = environment.get_template({"one": "card.j2"}.get(form, f"{form}.j2"))
        told = _lenient(stories)
        said = template.render(stories=told, story=told[0], form=form)
        return [line.rstrip() for line in said.splitlines() if line.strip()]


@lru_cache(maxsize=8)
def _made(language: Language, own: Path | None, _changed: tuple[float, ...]) -> Templates:
    return Templates(language, own)


def of(inventory: Inventory) -> Templates:
    """The templates as they are now. Raises TemplateError."""
    notify = inventory.notify
    files = [notify.templates / name for name in NAMES] if notify.templates is not None else []
    changed = tuple(file.stat().st_mtime for file in files if file.is_file())
    return _made(notify.language, notify.templates, changed)


def ours(inventory: Inventory) -> Templates:
    """Our own templates, whatever the user's directory holds."""
    return _made(inventory.notify.language, None, ())


def fault(error: Exception, own: Path) -> str:
    """What is wrong with the user's templates, with the file and the line where that can be told."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename or own}:{error.lineno}: {error.message}"
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"{own}/")]
    where = f"{places[-1].filename}:{places[-1].lineno}" if places else str(own)
    return f"{where}: {error if isinstance(error, TemplateError) else f'{type(error).__name__}: {error}'}"


def _merged(ours: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _merged(value, own[key])
        if isinstance(value, dict) and isinstance(own.get(key), dict)
        else own.get(key, value)
        for key, value in ours.items()
    }


def duration(words: Mapping[str, Any], seconds: float) -> str:
    """Seconds in words, in no more than two units."""
    whole = max(0, round(seconds))
    short = max(0.0, round(seconds, 1))
    second, minute, hour, day = words["units"]
    if whole < 60:  # noqa: PLR2004
        return str(second.format(f"{short:g}" if short < 10 else whole))  # noqa: PLR2004
    if whole < 3600:  # noqa: PLR2004
        return str(minute.format(*divmod(whole, 60)))
    if whole < 86400:  # noqa: PLR2004
        return str(hour.format(whole // 3600, whole % 3600 // 60))
    return str(day.format(whole // 86400, whole % 86400 // 3600))


class _Lenient(dict[str, Any]):
    """What a label, an annotation or a fact is that is not there: nothing."""

    def __missing__(self, _key: str) -> str:
        return ""


def _lenient(stories: Sequence[Story]) -> list[Story]:
    return [
        replace(each, labels=_Lenient(each.labels), annotations=_Lenient(each.annotations), facts=_Lenient(each.facts))
        for each in stories
    ]


def _printed(shown: Callable[[str], str], value: Any) -> Any:
    return value if hasattr(value, "__html__") else Markup(shown(clean(str(value))))  # noqa: S704 - it is safe now


def _bold(name: Any) -> Markup:
    return Markup(f"**{escape(clean(str(name), 60))}**")  # noqa: S704 - it is escaped


def _plain_bold(name: Any) -> Markup:
    return Markup(f"{clean(str(name), 60)}:")  # noqa: S704 - it is no markup at all


def _lines(shown: Callable[[str], str], text: str, most: int) -> Markup:
    last = [line for line in text.splitlines() if line.strip()][-most:]
    return Markup("\n".join(f"› {shown(clean(line, 200))}" for line in last))  # noqa: S704 - it is safe now


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S %Z")


def _shared_labels(stories: Sequence[Story]) -> dict[str, str]:
    """The labels that all have, with the same value."""
    first = dict(stories[0].labels)
    return {name: value for name, value in first.items() if all(each.labels.get(name) == value for each in stories)}


def _counted(stories: Sequence[Story]) -> list[tuple[State, int]]:
    return Counter(story.state for story in stories).most_common()


def _busiest_hosts(stories: Sequence[Story]) -> list[tuple[str, int]]:
    """The hosts that most of them are on, where hosts say anything."""
    hosts = Counter(story.host for story in stories if story.host)
    return hosts.most_common(HOSTS_SHOWN) if len(hosts) < len(stories) else []
