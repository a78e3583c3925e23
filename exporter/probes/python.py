"""The `python` probe: a function of the user's, in a process of its own that is ended at the deadline."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import EXAMINED
from exporter.results import ProbeFailure, Reason, Seen
from fleet.inventory.documents import ConfigText
from fleet.inventory.endpoints import ConfigModel
from fleet.shells.local import LocalShell

CHILD = Path(__file__).with_name("python_child.py")


@dataclass(frozen=True, slots=True)
class Call:
    """`package.module:function`, and the folder of the file that names it, which is looked in first."""

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name


_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _call(value: object) -> Call:
    if not isinstance(value, str) or re.fullmatch(_FUNCTION, value) is None:
        raise ValueError("is not a function (write package.module:function)")
    return Call(str(value), value.base if isinstance(value, ConfigText) else Path())


class PythonOptions(ConfigModel):
    call: Annotated[
        Call, PlainValidator(_call), PlainSerializer(str), WithJsonSchema({"type": "string", "pattern": _FUNCTION})
    ]
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _json(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be handed on: {error}") from None
        return options


class _Told(BaseModel):
    """What the child prints; the function may have printed there before it, or in its place."""

    reason: str | None
    message: str
    traceback: str


async def probe_python(options: PythonOptions, means: Means, seen: Seen) -> None:
    wanted = {
        "call": options.call.name,
        "folder": str(options.call.folder),
        "context": {
            "service": means.service,
            "host": means.host,
            "timeout": means.timeout,
            "options": options.options,
        },
    }
    # Not `python -m`: the child must start fast, and its folder must not stand in the way of the user's modules.
    argv = [sys.executable, "-P", str(CHILD)]
    done = await LocalShell(read_only=True).run(argv, timeout=means.timeout, stdin=json.dumps(wanted).encode())
    seen.evidence["printed"] = seen.redact(done.stderr[-EXAMINED:])[-1000:]
    if done.status is None and done.late:
        raise ProbeFailure("timeout", f"{options.call} did not end within {means.timeout:g} s")
    if done.status is None:
        raise ProbeFailure("error", f"{options.call}: {done.why}")
    try:
        told = _Told.model_validate_json(done.stdout)
    except ValueError:
        raise ProbeFailure("error", f"{options.call} ended its process with status {done.status}") from None
    if told.traceback:
        seen.evidence["traceback"] = told.traceback
    if told.reason is not None:
        known: dict[str, Reason] = {name: name for name in get_args(Reason)}
        raise ProbeFailure(known.get(told.reason, "error"), told.message)


PYTHON = Kind(PythonOptions, probe_python)
