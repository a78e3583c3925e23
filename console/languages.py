"""The languages of the console: which one a reader gets, and its texts."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from aiohttp import web

from fleet.inventory.notify import Language

COOKIE = "defib_language"
LANGUAGES: tuple[Language, ...] = get_args(Language)
HTML_LANGUAGE: Mapping[Language, str] = MappingProxyType({"en": "en", "zh": "zh-CN"})
_FOLDER = Path(__file__).parent / "texts"


def choose_language(request: web.Request, default: Language) -> Language:
    """Return the language that the reader chose, else the first known one of their browser, else `default`."""
    chosen = _find(request.cookies.get(COOKIE, ""))
    if chosen is not None:
        return chosen
    for part in request.headers.get("Accept-Language", "")[:200].split(","):
        language = _find(part.split(";")[0].strip().split("-")[0].lower())
        if language is not None:
            return language
    return default


def _find(text: str) -> Language | None:
    return next((language for language in LANGUAGES if language == text), None)


@cache
def load_texts(language: Language) -> Mapping[str, Any]:
    """Return the texts of a language, from its file in `texts/`."""
    texts: Mapping[str, Any] = yaml.safe_load((_FOLDER / f"{language}.yaml").read_text())
    return texts
