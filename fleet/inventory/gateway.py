"""The gateway's settings: upstreams with their limits, the queue, the retreat from refusals, and clients."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    SecretStr,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fleet.inventory.endpoints import ConfigModel, Endpoint, OwnToken, RelativePath, TlsSettings, Token, Url
from fleet.inventory.heartbeats import check_listen
from fleet.inventory.units import (
    DURATION_SCHEMA,
    Identifier,
    PositiveDuration,
    Size,
    format_value,
    parse_ratio,
)

Priority = Literal["urgent", "high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("urgent", "high", "normal", "low")  # the most important first
WhenFull = Literal["reject", "drop-lowest", "passthrough"]
_PER_MINUTE = {"s": 60.0, "min": 1.0, "h": 1 / 60}
_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h)")
_REDIS = re.compile(r"rediss?://(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?(?:/\d{0,4})?", re.ASCII)
_MIN_RATE, _MAX_RATE = 1.0, 1e9  # a minute


def parse_rate(value: object) -> float:
    """Return what `40/min`, `2/s` or `600/h` allows in a minute. Raises ValueError."""
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{format_value(value)} is not a rate; write 40/min, 2/s or 600/h")
    rate = float(match[1]) * _PER_MINUTE[match[2]]
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise ValueError(f"{value} is not between 1/min and 1000000000/min")
    return rate


def format_rate(per_minute: float) -> str:
    """Return a text that `parse_rate` accepts."""
    return f"{per_minute:.10g}/min"


def _check_name(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError(f"{format_value(text)} is not the name of a model: it must be printable, and not empty")
    return text


def _check_redis_url(url: str) -> str:
    if "@" in url:
        raise ValueError("must not contain credentials; use `username` and `password`")
    if _REDIS.fullmatch(url) is None or urlsplit(url).port == 0:  # ValueError if the port is too large
        raise ValueError(
            "must be the address of a Redis server, such as redis://10.0.0.5:6379/0, or rediss:// with TLS"
        )
    return url


Rate = Annotated[
    float,
    BeforeValidator(parse_rate),
    PlainSerializer(format_rate),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)?/(s|min|h)$"}),
]
Ratio = Annotated[
    float,
    BeforeValidator(parse_ratio),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^\d+(\.\d+)?%?$"}]}),
]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(_check_name)]


class UpstreamSettings(ConfigModel):
    """A model API with one key, and what that key allows."""

    url: Url
    api_key: OwnToken | None = None
    provider: Identifier | None = None  # the label of metrics; by default, the upstream's name
    rate: Rate = 40.0
    tokens: Rate | None = None
    burst: int | None = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)
    match: list[ModelName] = []
    aliases: dict[ModelName, ModelName] = Field(default_factory=dict)
    timeout: PositiveDuration = 300.0
    fallback: list[str] = []
    tls: TlsSettings = TlsSettings()


class MaxWait(ConfigModel):
    """How long requests of each priority wait: a duration for all, or a map.

    By default longer than the 61 s after which the next requests are sent when all of a minute were sent together.
    """

    urgent: PositiveDuration = 120.0
    high: PositiveDuration = 120.0
    normal: PositiveDuration = 120.0
    low: PositiveDuration | None = None  # by default, `low_timeout`

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return dict.fromkeys(("urgent", "high", "normal"), value) if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a schema that allows the short form."""
        part = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [DURATION_SCHEMA, part]} if "properties" in part else part


class QueueSettings(ConfigModel):
    """The requests that wait for an upstream."""

    size: int = Field(500, ge=0, le=100_000)
    when_full: WhenFull = "reject"
    low_timeout: PositiveDuration = 2.0
    max_wait: MaxWait = MaxWait()
    ageing: PositiveDuration = 30.0

    @property
    def waits(self) -> Mapping[Priority, float]:
        """How long requests of each priority wait, in seconds."""
        wait = self.max_wait
        low = wait.low if wait.low is not None else self.low_timeout
        return {"urgent": wait.urgent, "high": wait.high, "normal": wait.normal, "low": low}


class RetreatSettings(ConfigModel):
    """How the rate follows the share of answers that are 429."""

    cut_at: Ratio = 0.05
    factor: Ratio = 0.75
    floor_at: Ratio = 0.2
    floor: Rate = 5.0
    recover_below: Ratio = 0.02
    recover_after: PositiveDuration = 120.0
    step: Rate = 2.0

    @model_validator(mode="after")
    def _check_order(self) -> "RetreatSettings":
        shares = (self.recover_below, self.cut_at, self.floor_at)
        if all(isinstance(each, float) for each in shares) and not (shares[0] <= shares[1] <= shares[2]):
            raise ValueError("recover_below must not exceed cut_at, and cut_at must not exceed floor_at")
        return self


class Budget(ConfigModel):
    """What a client may use in a day, in UTC."""

    requests: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)


class ClientSettings(ConfigModel):
    """A client that shows its token in place of an API key."""

    token: OwnToken
    priority: Priority = "normal"
    share: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    budget: Budget = Budget()


class SharedSettings(ConfigModel):
    """A Redis server in which several gateways together count what they send."""

    redis: Annotated[str, AfterValidator(_check_redis_url)]
    username: str | None = None
    password: Token | None = None
    gateways: int = Field(ge=2, le=100)


class GatewaySettings(ConfigModel):
    listen: Annotated[str, AfterValidator(check_listen)] = "127.0.0.1:9190"
    metrics_listen: Annotated[str, AfterValidator(check_listen)] | None = None  # for metrics and health alone
    url: Endpoint = Endpoint(url="http://127.0.0.1:9190")  # as browsers know it
    token: OwnToken | None = None
    upstreams: dict[Identifier, UpstreamSettings] = Field(default_factory=dict)
    default: str | None = None
    queue: QueueSettings = QueueSettings()
    retreat: RetreatSettings = RetreatSettings()
    clients: dict[Identifier, ClientSettings] = Field(default_factory=dict)
    state_file: RelativePath | None = None
    shared: SharedSettings | None = None
    max_body: Size = 64 * 2**20

    @model_validator(mode="before")
    @classmethod
    def _derive_url(cls, written: Any) -> Any:
        """The gateway is reached where it listens, unless the configuration says otherwise."""
        if not isinstance(written, dict) or "url" in written or not isinstance(listen := written.get("listen"), str):
            return written
        host, _, port = listen.rpartition(":")
        reached = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared
        return {**written, "url": f"http://{reached}:{port}"} if port.isdigit() else written

    @model_validator(mode="after")
    def _check_tokens(self) -> "GatewaySettings":
        """Check that a token belongs to one client, and gives no other access."""
        owners: dict[str, str] = {}
        tokens = {"token": self.token, **{f"clients.{name}.token": each.token for name, each in self.clients.items()}}
        for name, token in tokens.items():
            if isinstance(token, SecretStr):
                other = owners.setdefault(token.get_secret_value(), name)
                if other != name:
                    raise ValueError(f"{name}: must differ from {other}")
        return self

    @model_validator(mode="after")
    def _check_queue(self) -> "GatewaySettings":
        """Check that requests can wait for the answer of Redis."""
        if self.shared is not None and self.queue.size == 0:
            raise ValueError("queue.size: must be at least 1 with `shared`")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> "GatewaySettings":
        """Check that no two upstreams have the same key: each would use its whole rate."""
        owners: dict[tuple[str, str], str] = {}
        for name, upstream in self.upstreams.items():
            if isinstance(upstream.api_key, str):  # a reference that this program does not resolve
                continue
            key = upstream.api_key.get_secret_value() if upstream.api_key is not None else ""
            other = owners.setdefault((upstream.url.rstrip("/"), key), name)
            if other != name:
                raise ValueError(
                    f"upstreams.{name}: has the same url and api_key as {other}: one upstream has them all"
                )
        return self
