"""An AI agent that reports its progress with its heartbeat: when it is stuck, and how it is woken."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.inventory.units import PositiveDuration, format_ratio, parse_ratio

_RATIO_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "number"}]}
Ratio = Annotated[float, BeforeValidator(parse_ratio), PlainSerializer(format_ratio), WithJsonSchema(_RATIO_SCHEMA)]
AGENT_STUCK = "AgentStuck"  # the alert
Role = Literal["steering", "developing", "operating", "other"]
# The defaults of roles, where they differ from those of the model: what a team of 15 agents has found to work.
_BY_ROLE: dict[str, dict[str, Any]] = {
    "steering": {"stuck_after": "20m", "confirm_after": "30m", "rounds_limit": 50, "dependency_wait": "1h"},
    "developing": {"rounds_limit": 100},
    "operating": {"rounds_limit": 100},
}


class Agent(ConfigModel):
    """When an agent is stuck; the role decides on the limits that are not set.

    `wake` is a command on the service's host that makes the agent run once more.
    """

    role: Role = "other"
    stuck_after: PositiveDuration = 1800.0
    confirm_after: PositiveDuration = 2700.0
    rounds_limit: int = Field(30, ge=1)
    warn_at: Ratio = 0.8
    dependency_wait: PositiveDuration = 7200.0
    wake: Annotated[Annotated[list[str], Field(min_length=1)] | None, REFERENCES_ARE_SECRET] = None
    recover_within: PositiveDuration = 900.0
    # As of a step of the remediation ladder.
    approve: ClassVar[bool] = False
    attempts: ClassVar[int] = 1

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {**_BY_ROLE.get(str(value.get("role")), {}), **value}

    @model_validator(mode="after")
    def _check_order(self) -> "Agent":
        if self.confirm_after < self.stuck_after:
            raise ValueError("confirm_after: must not be shorter than stuck_after")
        return self
