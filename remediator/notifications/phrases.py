"""Reasons and messages of the record, which are in English, in the language of a reader.

What Defib itself says is translated by a table of phrases. Everything else, such as the output of a command or the
error of a server, is quoted as it is.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

RUNBOOK = "runbook "  # begins the kind of actions that run a runbook
SEPARATOR = "; "  # between the sentences of a message
_RUNBOOK_KIND = re.compile(r"runbook [a-z0-9][a-z0-9._-]*")
_PLACE = re.compile(r"\{(\w+)\}")
_NUMBER = r"\d+(?:\.\d+)?"
_LONGEST = 2000  # characters of a message that is translated


def translate(words: Mapping[str, Any], text: str) -> str:
    """Return a message in the language of `words`; as it is, if that has no phrases."""
    if not words["phrases"] or not text or len(text) > _LONGEST:
        return text
    phrases = _compile(tuple(words["phrases"]))
    return str(words["joined"]).join(_translate_sentence(words, phrases, each) for each in text.split(SEPARATOR))


def name_kind(words: Mapping[str, Any], kind: str) -> str:
    """Return what an action does: the name of a step, or of a runbook."""
    if kind.startswith(RUNBOOK):
        return str(words["of_runbook"]).format(kind.removeprefix(RUNBOOK))
    return str(words["kinds"].get(kind, kind))


def translate_failure(words: Mapping[str, Any], failure: str) -> str:
    """Return a failed probe: its reason, in words, and its message."""
    return _translate_reason(words, failure) or failure


def _translate_sentence(words: Mapping[str, Any], phrases: Sequence[tuple[re.Pattern[str], str]], text: str) -> str:
    if text in words["kinds"] or _RUNBOOK_KIND.fullmatch(text) is not None:
        return name_kind(words, text)
    for pattern, translation in phrases:
        if (match := pattern.fullmatch(text)) is not None:
            values = {
                # Only what may itself be a sentence is translated; names and numbers stay.
                name: _translate_sentence(words, phrases, value) if name.startswith("text") else value
                for name, value in match.groupdict().items()
            }
            return translation.format(**values)
    return _translate_reason(words, text) or str(words["quoted"]).format(text)


def _translate_reason(words: Mapping[str, Any], text: str) -> str:
    """Return the reason of a failed probe and its message, which is quoted; empty if there is no such reason."""
    reason, found, message = text.partition(": ")
    if reason not in words["probe_reasons"]:
        return ""
    return str(words["probe_reasons"][reason]) + (str(words["said"]).format(message) if found else "")


@lru_cache(maxsize=8)
def _compile(phrases: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_build_pattern(phrase), translation) for phrase, translation in phrases)


def _build_pattern(phrase: str) -> re.Pattern[str]:
    """Return the pattern of a phrase: places of one letter match numbers, others any text."""
    parts = _PLACE.split(phrase)
    texts, names = parts[::2], parts[1::2]
    pattern = re.escape(texts[0])
    for name, text in zip(names, texts[1:], strict=True):
        pattern += f"(?P<{name}>{_NUMBER if len(name) == 1 else '.+?'}){re.escape(text)}"
    return re.compile(pattern, re.DOTALL)
