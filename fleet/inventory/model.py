"""The inventory: what may stand in the configuration, and what it means.

The kinds of probes, controls and channels bring their own options; `inventory_model` puts all together.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, create_model, field_validator, model_validator

from fleet.inventory.documents import Text
from fleet.inventory.endpoints import Endpoint, OneOf, Part, RelativePath, Token
from fleet.inventory.kinds import Kind, Kinds, OptionsOf
from fleet.inventory.notify import Channel, Notify, Severity
from fleet.inventory.units import Duration, Identifier, PositiveDuration


def _time_of_day(text: str) -> str:
    if re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", text) is None:
        raise ValueError("is not a time of day (write 02:30, in quotes)")
    return text


TimeOfDay = Annotated[str, AfterValidator(_time_of_day)]
LABEL_NAME = r"^[a-zA-Z_][a-zA-Z0-9_]*$"
OWN_LABELS = ("host", "group", "address", "job", "instance")  # the last two are Prometheus' own


class Collect(Part):
    """What is read of a host regularly; each kind's options stand under its key."""


class Probe(OneOf):
    """When a service is probed and when its state changes; the kind's options stand under its key."""

    every: PositiveDuration
    retry_every: PositiveDuration
    timeout: PositiveDuration
    fail_after: int = Field(ge=1)
    recover_after: int = Field(ge=1)
    slow_after: PositiveDuration | None = None


class Control(OneOf):
    """How a service is started and stopped; the kind's options stand under its key."""

    timeout: PositiveDuration
    start_within: PositiveDuration


class Backoff(Part):
    first: PositiveDuration = 60.0
    factor: float = Field(2.0, ge=1)
    cap: PositiveDuration = 900.0


class Storm(Part):
    ratio: float = Field(0.5, gt=0, le=1)
    at_least: int = Field(3, ge=1)


class RestartStep(Part):
    approve: bool = False


class Recreate(Part):
    """The container anew, from its image and with the arguments it had, or a command of the user's instead."""

    command: Annotated[list[str], Field(min_length=1)] | None = None
    approve: bool = True
    attempts: int = Field(1, ge=1)


class Step(OneOf):
    """A step of the ladder; `restart` stands for `{restart: {}}`."""

    choices: ClassVar[tuple[str, ...]] = ("restart", "recreate")
    restart: RestartStep | None = None
    recreate: Recreate | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {value: {}} if isinstance(value, str) and value in cls.choices else value

    @property
    def wants_approval(self) -> bool:
        return bool(self.options.approve)


def _steps(steps: list[Step]) -> list[Step]:
    kinds = [step.kind for step in steps]
    if len(set(kinds)) < len(kinds):
        raise ValueError("names a step twice (give it more attempts)")
    return steps


Steps = Annotated[list[Step], Field(min_length=1), AfterValidator(_steps)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class MaintenanceWindow(OneOf):
    """Every week, in the fleet's time zone; one that ends before it begins ends on the next day."""

    choices: ClassVar[tuple[str, ...]] = ("service", "host", "group")
    service: str | None = None
    host: str | None = None
    group: str | None = None
    days: list[Day] = list(DAYS)
    from_: TimeOfDay = Field(alias="from")
    to: TimeOfDay
    reason: str = ""
    notify: bool = False


class ServiceRemediation(Part):
    """What one service may say otherwise than the fleet."""

    alerts: list[str] | None = None
    never_for: list[str] | None = None
    attempts: int | None = Field(None, ge=1)
    window: PositiveDuration | None = None
    backoff: Backoff | None = None
    hold: Duration | None = None
    steps: Steps | None = None
    respect_stop: bool | None = None


class Remediation(Part):
    automatic: bool = True
    alerts: list[str] = ["ServiceDown"]
    never_for: list[str] = ["resolve", "tls", "redirect", "auth", "shell", "error"]
    attempts: int = Field(3, ge=1)
    window: PositiveDuration = 3600.0
    backoff: Backoff = Backoff()
    hold: Duration = 60.0
    steps: Steps = [Step(restart=RestartStep())]
    respect_stop: bool = True
    actions_per_host: int = Field(1, ge=1)
    actions_in_flight: int = Field(5, ge=1)
    actions_per_10m: int = Field(20, ge=1)
    storm: Storm = Storm()
    maintenance: list[MaintenanceWindow] = []

    def of(self, service: "Service | None") -> "Remediation":
        """These settings as they hold for one service, or for one that is no longer in the inventory."""
        if service is None:
            return self
        own = {name: value for name, value in service.remediation if value is not None}
        return self.model_copy(update=own)


class Service(Part):
    name: str = ""
    category: str = "other"
    provider: str = "other"
    host: str = ""
    team: str = ""
    severity: Severity = "critical"
    probe: Probe
    control: Control | None = None
    on_failure: Literal["notify", "restart"] = "notify"
    objective: float | None = Field(None, gt=0, lt=100)
    depends_on: list[str] = []
    runbook: str = ""
    remediation: ServiceRemediation = ServiceRemediation()
    _id: str = ""
    _digest: str = ""
    _target: str = ""

    @property
    def digest(self) -> str:
        """Digest of the probe and host, by `fleet.inventory.digests`; empty where they were not loaded from files."""
        return self._digest

    @property
    def id(self) -> str:
        return self._id

    @property
    def title(self) -> str:
        return self.name or self._id

    @property
    def target(self) -> str:
        """What its control acts on, on its host; without secrets. Services that share one are locked together."""
        return self._target


class Ssh(Part):
    user: str | None = None
    port: int = Field(22, ge=1, le=65535)
    key_file: RelativePath | None = None
    known_hosts: RelativePath = Field(default_factory=lambda: Path.home() / ".ssh" / "known_hosts")
    via: str | None = None
    wrapper: bool = False


class Sudo(Part):
    """`none`, `passwordless`, or `{password: …}`."""

    mode: Literal["none", "passwordless", "password"] = "none"
    password: SecretStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in ("none", "passwordless"):
                raise ValueError("is none, passwordless or {password: …}")
            return {"mode": value}
        if isinstance(value, dict) and "password" in value:
            return {**value, "mode": "password"}
        return value


class Host(Part):
    address: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._:%-]+$")
    group: str = ""
    shell: Literal["ssh", "local"] = "ssh"
    ssh: Ssh | None = None
    control_ssh: Ssh | None = None
    sudo: Sudo = Sudo()
    collect: Collect = Collect()
    labels: dict[Annotated[str, Field(pattern=LABEL_NAME)], str] = Field(default_factory=dict)
    _name: str = ""

    @field_validator("labels")
    @classmethod
    def _not_ours(cls, labels: dict[str, str]) -> dict[str, str]:
        for name in labels:
            if name in OWN_LABELS or name.startswith("__"):
                raise ValueError(f"{name} is a label of its own already, or reserved")
        return labels

    @property
    def reach(self) -> tuple[object, ...]:
        """All that its shell depends on."""
        return self.address, self.shell, self.ssh, self.control_ssh

    @property
    def name(self) -> str:
        return self._name

    @property
    def has_shell(self) -> bool:
        return self.shell == "local" or self.ssh is not None

    def ssh_for(self, *, control: bool) -> Ssh:
        """How to connect: `control_ssh` takes the place of the same keys of `ssh`."""
        ssh = self.ssh or Ssh()
        if not control or self.control_ssh is None:
            return ssh
        own = {name: getattr(self.control_ssh, name) for name in self.control_ssh.model_fields_set}
        return ssh.model_copy(update={**own, "wrapper": self.control_ssh.wrapper})  # a key that controls has its own


class ExporterSettings(Part):
    url: Endpoint = Endpoint(url="http://127.0.0.1:9999")
    token: Token | None = None


class RemediatorSettings(Part):
    url: Endpoint = Endpoint(url="http://127.0.0.1:9095")
    database: str = "sqlite:////var/lib/defib/remediator.db"
    token: Token | None = None
    webhook_token: Token | None = None
    prometheus_url: Endpoint | None = None
    alertmanager_url: Endpoint | None = None
    grafana_url: Endpoint | None = None
    watchdog: Duration = 300.0
    retention: PositiveDuration = 90 * 86400.0

    @field_validator("database", mode="before")
    @classmethod
    def _sqlite(cls, url: Any) -> Any:
        if not isinstance(url, str) or not url.startswith("sqlite:///") or url == "sqlite:///":
            raise ValueError("is not sqlite:///PATH (four slashes before an absolute path)")
        path = url.removeprefix("sqlite:///")
        return f"sqlite:///{url.base / path}" if isinstance(url, Text) else url

    @property
    def token_file(self) -> Path | None:
        """Where the API token is if no setting has it: beside the record; None where that is not known."""
        if "${" in self.database:  # a reference that this program does not resolve
            return None
        return Path(self.database.removeprefix("sqlite:///")).parent / "token"


class ProbeDefaults(Part):
    every: PositiveDuration = 30.0
    retry_every: PositiveDuration = 30.0
    timeout: PositiveDuration = 10.0
    fail_after: int = Field(2, ge=1)
    recover_after: int = Field(1, ge=1)
    slow_after: PositiveDuration | None = None


class ControlDefaults(Part):
    timeout: PositiveDuration = 120.0
    start_within: PositiveDuration = 300.0


class Defaults(Part):
    probe: ProbeDefaults = ProbeDefaults()
    control: ControlDefaults = ControlDefaults()


class Inventory(Part):
    exporter: ExporterSettings = ExporterSettings()
    remediator: RemediatorSettings = RemediatorSettings()
    defaults: Defaults = Defaults()
    remediation: Remediation = Remediation()
    notify: Notify = Notify()
    hosts: dict[Identifier, Host] = Field(default_factory=dict)
    services: dict[Identifier, Service] = Field(default_factory=dict)
    _by_target: dict[tuple[str, str], list[str]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _know_their_names(self) -> "Inventory":
        for key, host in self.hosts.items():
            host._name = key  # noqa: SLF001 - the map is where a host has its name
        for key, service in self.services.items():
            service._id = key  # noqa: SLF001
            target = service.control.options.target if isinstance(service.control, Control) else ""
            service._target = target or f"service:{key}"  # noqa: SLF001
        self._know_their_targets()
        return self

    def _know_their_targets(self) -> None:
        self._by_target = {}
        for name, service in self.services.items():
            self._by_target.setdefault((service.host, service.target), []).append(name)

    def mask_targets(self, redact: Callable[[str], str]) -> None:
        """Take the secrets out of what the targets of services are called."""
        for service in self.services.values():
            service._target = redact(service._target)  # noqa: SLF001
        self._know_their_targets()

    def sharing(self, service: Service) -> list[str]:
        """The services whose controls act on the same target of the same host, `service` among them."""
        return self._by_target[service.host, service.target]

    @model_validator(mode="after")
    def _remember_long_enough(self) -> "Inventory":
        windows = [self.remediation.window, *(self.remediation.of(each).window for each in self.services.values())]
        # A reference that this program does not resolve is text.
        longest = max([600.0, *(window for window in windows if isinstance(window, float))])
        if isinstance(self.remediator.retention, float) and self.remediator.retention < longest:
            raise ValueError("remediator.retention: is shorter than a remediation.window, or than ten minutes")
        return self

    def host_of(self, service: Service) -> Host | None:
        return self.hosts.get(service.host)


@cache
def inventory_model(kinds: Kinds) -> type[Inventory]:
    """The inventory with the options of `kinds` as its probes, controls and channels.

    The same kinds give the same model, so that what two loads made can be compared.
    """
    probe: Any = _one_of("Probe", Probe, kinds.probes)
    control: Any = _one_of("Control", Control, kinds.controls)
    channel: Any = _one_of("Channel", Channel, kinds.channels)
    collect: Any = create_model("Collect", __base__=Collect, **_fields(kinds.collectors))
    host: Any = create_model("Host", __base__=Host, collect=(collect, Field(default_factory=collect)))
    service: Any = create_model("Service", __base__=Service, probe=(probe, ...), control=(control | None, None))
    channels: Any = (dict[Identifier, channel], Field(default_factory=dict))
    notify: Any = create_model("Notify", __base__=Notify, channels=channels)
    services: Any = (dict[Identifier, service], Field(default_factory=dict))
    wanted = Field(default_factory=notify)
    hosts: Any = (dict[Identifier, host], Field(default_factory=dict))
    return create_model("Inventory", __base__=Inventory, notify=(notify, wanted), services=services, hosts=hosts)


def _one_of(name: str, base: type[OneOf], kinds: Mapping[str, Kind]) -> type[OneOf]:
    class Chosen(base):  # type: ignore[misc, valid-type]
        choices: ClassVar[tuple[str, ...]] = tuple(kinds)

    return cast("type[OneOf]", create_model(name, __base__=Chosen, **_fields(kinds)))


def _fields(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """One optional field for each kind."""
    return {name: (Annotated[Any, OptionsOf(kinds, name)], None) for name in kinds}


def json_schema(kinds: Kinds) -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors."""
    schema = inventory_model(kinds).model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Defib configuration"
    choices = {"Probe": kinds.probes, "Control": kinds.controls, "Channel": kinds.channels}
    for name, part in schema["$defs"].items():
        if name in choices:
            # What the defaults fill in may be left out; one kind must be there, and only one.
            part.pop("required", None)
            part["oneOf"] = [{"required": [kind]} for kind in choices[name]]
        short = {
            "Endpoint": {"type": "string"},
            "Sudo": {"enum": ["none", "passwordless"]},
            "Step": {"enum": list(Step.choices)},
        }.get(name)
        if short:
            schema["$defs"][name] = {"anyOf": [short, part]}
    _open_to_references(schema)
    for section in schema["properties"]:
        schema["properties"][section] = {"anyOf": [schema["properties"][section], {"type": "null"}]}
    return schema


_REFERENCE = {"type": "string", "pattern": r"\$\{"}


def _open_to_references(part: Any) -> None:
    """Where a number, a duration or the like stands, `${NAME}` may stand; keys that no pattern allows may not."""
    if isinstance(part, list):
        for item in part:
            _open_to_references(item)
    if not isinstance(part, dict):
        return
    if "patternProperties" in part:
        part["additionalProperties"] = False
    for key, item in list(part.items()):
        if key in ("properties", "patternProperties", "$defs"):
            for name, each in list(item.items()):
                _open_to_references(each)
                if key == "properties" and _is_narrow(each):
                    item[name] = {"anyOf": [each, _REFERENCE]}
        else:
            _open_to_references(item)


def _is_narrow(part: Any) -> bool:
    return isinstance(part, dict) and (part.get("type") in ("integer", "number", "boolean") or "pattern" in part)
