"""The `python` probe: a function of the user's, in a process of its own that is ended at the deadline."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.probes.expectations import EXAMINED
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.documents import Text
from fleet.inventory.endpoints import Part
from fleet.shells.local import LocalShell

CHILD = Path(__file__).with_name("python_subprocess.py")


@dataclass(frozen=True, slots=True)
class PythonFunction:
    """`package.module:function`, and the folder of the file that names it, which is looked in first."""

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name


_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _call(value: object) -> PythonFunction:
    if not isinstance(value, str) or re.fullmatch(_FUNCTION, value) is None:
        raise ValueError("is not a function (write package.module:function)")
    return PythonFunction(str(value), value.base if isinstance(value, Text) else Path())


class PythonProbeOptions(Part):
    call: Annotated[
        PythonFunction,
        PlainValidator(_call),
        PlainSerializer(str),
        WithJsonSchema({"type": "string", "pattern": _FUNCTION}),
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


class _PythonOutcome(BaseModel):
    """What the child prints; the function may have printed there before it, or in its place."""

    reason: str | None
    message: str
    traceback: str


async def probe_python(options: PythonProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    wanted = {
        "call": options.call.name,
        "folder": str(options.call.folder),
        "context": {
            "service": context.service,
            "host": context.host,
            "timeout": context.timeout,
            "options": options.options,
        },
    }
    # Not `python -m`: the child must start fast, and its folder must not stand in the way of the user's modules.
    argv = [sys.executable, "-P", str(CHILD)]
    done = await LocalShell(looking=True).run(argv, timeout=context.timeout, stdin=json.dumps(wanted).encode())
    details.evidence["printed"] = details.redact(done.stderr[-EXAMINED:])[-1000:]
    if done.status is None and done.late:
        raise ProbeFailure("timeout", f"{options.call} did not end within {context.timeout:g} s")
    if done.status is None:
        raise ProbeFailure("error", f"{options.call}: {done.why}")
    try:
        told = _PythonOutcome.model_validate_json(done.stdout)
    except ValueError:
        raise ProbeFailure("error", f"{options.call} ended its process with status {done.status}") from None
    if told.traceback:
        details.evidence["traceback"] = told.traceback
    if told.reason is not None:
        known: dict[str, FailureReason] = {name: name for name in get_args(FailureReason)}
        raise ProbeFailure(known.get(told.reason, "error"), told.message)


PYTHON = ProbeKind(PythonProbeOptions, probe_python)
