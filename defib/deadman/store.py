"""The watcher's state in a file, which survives restarts."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defib.deadman.watch import Watch
from runtime.errors import StartError
from runtime.files import replace_file


def read_watch(path: Path, now: float) -> Watch:
    """Return the stored state, or a new one without a file. Raises StartError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Watch(now)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read {path}: {error}") from error
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StartError(f"{path} is damaged ({error}): remove it to start anew") from error


def write_watch(path: Path, watch: Watch) -> None:
    """Replace the stored state. Raises OSError."""
    replace_file(path, json.dumps(asdict(watch)).encode())


def _parse(stored: Any) -> Watch:
    def read(name: str) -> float | None:
        return None if stored[name] is None else _number(stored[name])

    notified = {str(channel): _number(at) for channel, at in dict(stored["notified"]).items()}
    return Watch(_number(stored["since"]), read("pinged_at"), read("missing_since"), read("returned_at"), notified)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a time")
    return float(value)
