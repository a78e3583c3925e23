"""The `python` probe: a function of the user, in a subprocess that is killed at the deadline."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.inventory.yaml_files import TextWithBase
from fleet.shells.local import LocalShell

SUBPROCESS = Path(__file__).with_name("python_subprocess.py")
PRINTED_LIMIT = 1000  # characters of the function's output that become evidence


@dataclass(frozen=True, slots=True)
class PythonFunction:
    """`package.module:function`, and the folder of the configuration file, which is searched for the module first."""

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name


_FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _parse_function(value: object) -> PythonFunction:
    if not isinstance(value, str) or re.fullmatch(_FUNCTION_PATTERN, value) is None:
        raise ValueError("must be a function (write package.module:function)")
    return PythonFunction(str(value), value.base if isinstance(value, TextWithBase) else Path())


class PythonProbeOptions(ConfigModel):
    call: Annotated[
        PythonFunction,
        PlainValidator(_parse_function),
        PlainSerializer(str),
        WithJsonSchema({"type": "string", "pattern": _FUNCTION_PATTERN}),
    ]
    options: Annotated[dict[str, Any], REFERENCES_ARE_SECRET] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be JSON values: {error}") from None
        return options


class _PythonOutcome(BaseModel):
    """The output of the subprocess. It is untrusted: the function may have written to stdout itself."""

    reason: str | None
    message: str
    traceback: str


async def probe_python(options: PythonProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    call = {
        "call": options.call.name,
        "folder": str(options.call.folder),
        "context": {
            "service": context.service,
            "host": context.host,
            "timeout": context.timeout,
            "options": options.options,
        },
    }
    # Not `python -m`: the subprocess must start quickly, and this folder must not hide the user's modules.
    argv = [sys.executable, "-P", str(SUBPROCESS)]
    completed = await LocalShell(read_only=True).run(argv, timeout=context.timeout, stdin=json.dumps(call).encode())
    details.evidence["printed"] = details.redact.redact_tail(completed.stderr, PRINTED_LIMIT)
    if completed.status is None and completed.late:
        raise ProbeFailure("timeout", f"{options.call} did not end within {context.timeout:g} s")
    if completed.status is None:
        raise ProbeFailure("error", f"{options.call}: {completed.why}")
    try:
        outcome = _PythonOutcome.model_validate_json(completed.stdout)
    except ValueError:
        message = f"{options.call} ended its process without a result (exit status {completed.status})"
        raise ProbeFailure("error", message) from None
    if outcome.traceback:
        details.evidence["traceback"] = outcome.traceback
    if outcome.reason is not None:
        reasons: dict[str, FailureReason] = {name: name for name in get_args(FailureReason)}
        raise ProbeFailure(reasons.get(outcome.reason, "error"), outcome.message)


PYTHON = ProbeKind(PythonProbeOptions, probe_python)
