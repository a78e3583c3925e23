"""The inventory: the model of the configuration, with its defaults.

Each kind of probe, control, channel and collector defines its own options; `inventory_model` joins them.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, create_model, field_validator, model_validator

from fleet.inventory.access import Access
from fleet.inventory.agents import AGENT_STUCK, Agent
from fleet.inventory.endpoints import (
    REFERENCES_ARE_SECRET,
    ChoiceModel,
    ConfigModel,
    Endpoint,
    ExistingFile,
    OwnToken,
    RelativePath,
    SecretUrl,
)
from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.heartbeats import HeartbeatSettings
from fleet.inventory.host_selector import HostSelector, matches_host
from fleet.inventory.kinds import ConfigurableKind, KindOptions, KindTables
from fleet.inventory.module_targets import TargetPattern
from fleet.inventory.notify import Channel, Notify, Severity
from fleet.inventory.runbooks import Runbook
from fleet.inventory.thresholds import HostThresholds, ServiceThresholds
from fleet.inventory.units import (
    DAYS,
    Day,
    Duration,
    Identifier,
    PositiveDuration,
    TimeOfDay,
    as_list,
    format_duration,
)
from fleet.inventory.yaml_files import TextWithBase
from runtime.tokens import ConfiguredToken

MIN_INTERVAL = 0.1  # seconds between probes of a service
MIN_PING_INTERVAL, MAX_PING_INTERVAL = 1.0, 600.0  # seconds; the alert about failed pings looks back 15 minutes
LABEL_NAME = r"^[a-zA-Z_][a-zA-Z0-9_]*$"
RESERVED_LABELS = ("host", "group", "address", "job", "instance")  # Prometheus sets the last two


class Collect(ConfigModel):
    """The collectors of a host; the options of each are under its key."""


def _check_interval(seconds: float) -> float:
    if seconds < MIN_INTERVAL:
        raise ValueError(f"{format_duration(seconds)} is too short; the minimum is {format_duration(MIN_INTERVAL)}")
    return seconds


Interval = Annotated[PositiveDuration, AfterValidator(_check_interval)]


class ProbeSettings(ConfigModel):
    """When a service is probed, and when its state changes."""

    every: Interval = 30.0
    retry_every: Interval = 30.0
    timeout: PositiveDuration = 10.0
    fail_after: int = Field(3, ge=1)
    recover_after: int = Field(1, ge=1)
    slow_after: PositiveDuration | None = None


class ControlSettings(ConfigModel):
    """How long an action on a service may take."""

    timeout: PositiveDuration = 120.0
    start_within: PositiveDuration = 300.0


class Probe(ProbeSettings, ChoiceModel):
    """A service's probe; the options of its kind are under the kind's key."""

    @model_validator(mode="after")
    def _forget_other_kinds(self) -> "Probe":
        """Keep no None for each other kind: for 10,000 services, these take five megabytes."""
        values = {name: value for name, value in self.__dict__.items() if name not in self.choices or value is not None}
        object.__setattr__(self, "__dict__", values)
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return None for another kind."""
            return None if name in self.choices else super().__getattr__(name)

    @property
    def is_reported(self) -> bool:
        """Whether the service reports itself, instead of being probed on a schedule."""
        return bool(vars(type(self.options)).get("is_reported"))


class Control(ControlSettings, ChoiceModel):
    """How a service is started and stopped; the options of its kind are under the kind's key."""


class Backoff(ConfigModel):
    """The pause between attempts: `first`, then `factor` times the one before, at most `cap`."""

    first: PositiveDuration = 60.0
    factor: float = Field(2.0, ge=1)
    cap: PositiveDuration = 900.0


class Storm(ConfigModel):
    """The share and the number of failing services in a group at which automation waits."""

    ratio: float = Field(0.5, gt=0, le=1)
    at_least: int = Field(3, ge=1)


class RestartStep(ConfigModel):
    approve: bool = False


class RecreateStep(ConfigModel):
    """Remove a container and run it again from its image and with its arguments, or run a command that does so."""

    command: Annotated[Annotated[list[str], Field(min_length=1)] | None, REFERENCES_ARE_SECRET] = None
    approve: bool = True
    attempts: int = Field(1, ge=1)


class RemediationStep(ChoiceModel):
    """A step of the remediation ladder; `restart` is short for `{restart: {}}`."""

    choices: ClassVar[tuple[str, ...]] = ("restart", "recreate")
    restart: RestartStep | None = None
    recreate: RecreateStep | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return {value: {}} if isinstance(value, str) and value in cls.choices else value

    @property
    def needs_approval(self) -> bool:
        return bool(self.options.approve)


class RunbookStep(RemediationStep):
    """A step that runs a runbook on a host; it is made from `runbooks`, not written in `remediation.steps`."""

    choices: ClassVar[tuple[str, ...]] = ("runbook",)
    name: str
    runbook: Runbook

    @property
    def kind(self) -> str:
        return f"runbook {self.name}"

    @property
    def options(self) -> Runbook:
        return self.runbook


class WakeStep(RemediationStep):
    """A step that wakes an agent; it is made from `agent.wake`, not written in `remediation.steps`."""

    choices: ClassVar[tuple[str, ...]] = ("wake",)
    wake: Agent

    @property
    def command(self) -> list[str]:
        return self.wake.wake or []


def _check_steps(steps: list[RemediationStep]) -> list[RemediationStep]:
    kinds = [step.kind for step in steps]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"a step may be listed once; use its attempts (found {', '.join(kinds)})")
    return steps


Steps = Annotated[list[RemediationStep], Field(min_length=1), AfterValidator(_check_steps)]


class MaintenanceWindow(ChoiceModel):
    """A weekly maintenance window in `notify.timezone`; where `to` is before `from`, it ends on the next day."""

    choices: ClassVar[tuple[str, ...]] = ("service", "host", "group")
    service: str | None = None
    host: str | None = None
    group: str | None = None
    days: list[Day] = list(DAYS)
    from_: TimeOfDay = Field(alias="from")
    to: TimeOfDay
    reason: str = ""
    notify: bool = False


class ServiceRemediation(ConfigModel):
    """The settings of `remediation` that a service may override."""

    alerts: list[str] | None = None
    never_for: list[str] | None = None
    attempts: int | None = Field(None, ge=1)
    window: PositiveDuration | None = None
    backoff: Backoff | None = None
    hold: Duration | None = None
    steps: Steps | None = None
    respect_stop: bool | None = None


class Remediation(ConfigModel):
    automatic: bool = True
    alerts: list[str] = ["ServiceDown"]
    never_for: list[str] = ["resolve", "tls", "redirect", "auth", "shell", "error"]
    attempts: int = Field(3, ge=1)
    window: PositiveDuration = 3600.0
    backoff: Backoff = Backoff()
    hold: Duration = 60.0
    steps: Steps = [RemediationStep(restart=RestartStep())]
    respect_stop: bool = True
    actions_per_host: int = Field(1, ge=1)
    actions_in_flight: int = Field(5, ge=1)
    actions_per_10m: int = Field(20, ge=1)
    storm: Storm = Storm()
    maintenance: list[MaintenanceWindow] = []

    def for_service(self, service: "Remediable | None") -> "Remediation":
        """Return these settings with the overrides of `service`; without any where it has left the inventory.

        An agent is acted on also when it is stuck, and it is woken first.
        """
        if service is None:
            return self
        own = {name: value for name, value in service.remediation if value is not None}
        rules = self.model_copy(update=own) if own else self
        if service.agent is None:
            return rules
        wake: list[RemediationStep] = [WakeStep(wake=service.agent)] if service.agent.wake else []
        return rules.model_copy(update={"alerts": [*rules.alerts, AGENT_STUCK], "steps": [*wake, *rules.steps]})


class Service(ConfigModel):
    # Keys that `fleet.inventory.expansion` removes are here for the JSON Schema.
    enabled: bool = Field(True, exclude=True)
    template: str = Field("", exclude=True)
    parameters: dict[str, Any] = Field(default_factory=dict, exclude=True)
    name: str = ""
    category: str = "other"
    provider: str = "other"
    host: str = ""
    team: str = ""
    severity: Severity = "critical"
    probe: Probe
    control: Control | None = None
    on_failure: Literal["notify", "restart"] = "notify"
    agent: Agent | None = None
    objective: float | None = Field(None, gt=0, lt=100)
    thresholds: ServiceThresholds = ServiceThresholds()
    depends_on: list[str] = []
    runbook: str = ""
    remediation: ServiceRemediation = ServiceRemediation()
    _id: str = ""
    _digest: str = ""
    _target: str = ""

    @model_validator(mode="after")
    def _check_agent(self) -> "Service":
        if self.agent is not None and not self.probe.is_reported:
            raise ValueError("agent: only a service with a `heartbeat` probe reports its progress")
        return self

    @property
    def digest(self) -> str:
        """Digest of probe and host (`fleet.inventory.digests`); empty where they were not loaded from files."""
        return str(self._private("_digest"))

    @property
    def id(self) -> str:
        return str(self._private("_id"))

    @property
    def title(self) -> str:
        return self.name or self.id

    @property
    def restartable_components(self) -> Sequence[str]:
        """The components, as its probe names them, that its control may restart one by one."""
        return getattr(self.control.options, "components", None) or () if self.control is not None else ()

    @property
    def automatic_components(self) -> Sequence[str]:
        """The components that are restarted automatically when they are down."""
        component = getattr(self.control.options, "component", None) if self.control is not None else None
        return self.restartable_components if getattr(component, "automatic", False) is True else ()

    @property
    def target(self) -> str:
        """What the control acts on, without secrets. Services that share a target on one host are locked together."""
        return str(self._private("_target"))


@dataclass(frozen=True)
class HostAlert:
    """An alert of a host with runbooks: there are incidents of it and actions on it, as of a service."""

    alert: str
    host: str
    remediation: ServiceRemediation  # its steps are the runbooks, in the order of the inventory
    control: ClassVar[None] = None
    agent: ClassVar[None] = None
    on_failure: ClassVar[Literal["restart"]] = "restart"
    depends_on: ClassVar[Sequence[str]] = ()
    automatic_components: ClassVar[Sequence[str]] = ()
    digest: ClassVar[str] = ""

    @property
    def id(self) -> str:
        """What the record has in place of a service's ID; no ID contains an `@`."""
        return f"{self.alert}@{self.host}"

    @property
    def title(self) -> str:
        return f"{self.alert} · {self.host}"

    @property
    def target(self) -> str:
        return f"alert:{self.alert}"

    def find_runbook(self, kind: str) -> Runbook | None:
        """Return the runbook that actions of a kind run; None if the inventory no longer has it."""
        steps = (step for step in self.remediation.steps or () if isinstance(step, RunbookStep))
        return next((step.runbook for step in steps if step.kind == kind), None)


Remediable = Service | HostAlert  # what incidents are about


def is_host_alert(subject: str) -> bool:
    """Whether an incident's subject is an alert of a host, also if the inventory no longer has it."""
    return "@" in subject


class Ssh(ConfigModel):
    user: str | None = None
    port: int = Field(22, ge=1, le=65535)
    key_file: RelativePath | None = None
    certificate_file: RelativePath | None = None
    passphrase: SecretStr | None = None
    password: SecretStr | None = None
    known_hosts: RelativePath = Field(default_factory=lambda: Path.home() / ".ssh" / "known_hosts")
    via: str | None = None
    wrapper: bool = False
    legacy: bool = False


class SudoOptions(ConfigModel):
    """How commands become root: `none`, `passwordless`, or `{password: …}`."""

    mode: Literal["none", "passwordless", "password"] = "none"
    password: SecretStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in ("none", "passwordless"):
                raise ValueError(f"must be none, passwordless or {{password: …}}, not {value!r}")
            return {"mode": value}
        if isinstance(value, dict) and "password" in value:
            return {**value, "mode": "password"}
        return value


class Host(ConfigModel):
    # Keys that `fleet.inventory.expansion` removes are here for the JSON Schema.
    enabled: bool = Field(True, exclude=True)
    templates: dict[str, bool | dict[str, Any]] = Field(default_factory=dict, exclude=True)
    address: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._:%-]+$")
    group: str = ""
    shell: Literal["ssh", "local"] = "ssh"
    ssh: Ssh | None = None
    control_ssh: Ssh | None = None
    sudo: SudoOptions = SudoOptions()
    collect: Collect = Collect()
    thresholds: HostThresholds = HostThresholds()
    labels: dict[Annotated[str, Field(pattern=LABEL_NAME)], str] = Field(default_factory=dict)
    _name: str = ""

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if re.fullmatch(r"[0-9.-]+", address) is not None:  # no name: those do not end in a number
            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise ValueError(f"{address!r} is not an IP address") from None
        return address

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for name in labels:
            if name in RESERVED_LABELS or name.startswith("__"):
                raise ValueError(f"the label {name} is reserved; choose another name")
        return labels

    @property
    def connection_settings(self) -> tuple[object, ...]:
        """The settings that the host's shell depends on."""
        return self.address, self.shell, self.ssh, self.control_ssh

    @property
    def name(self) -> str:
        return str(self._private("_name"))

    @property
    def has_shell(self) -> bool:
        return self.shell == "local" or self.ssh is not None

    def ssh_for(self, *, control: bool) -> Ssh:
        """Return how to connect: for controls, the keys of `control_ssh` replace those of `ssh`."""
        ssh = self.ssh or Ssh()
        if not control or self.control_ssh is None:
            return ssh
        own = {name: getattr(self.control_ssh, name) for name in self.control_ssh.model_fields_set}
        if "key_file" in own:  # the others belong to the key that it replaces
            own = {**dict.fromkeys(("certificate_file", "passphrase", "password")), **own}
        return ssh.model_copy(update={**own, "wrapper": self.control_ssh.wrapper})  # belongs to the key


def find_connection_path(name: str, hosts: Mapping[str, Host], *, control: bool = False) -> list[str]:
    """Return the names of a host and of the jump hosts that lead to it, the nearest first; none for an unknown host."""
    route: list[str] = []
    while name in hosts and name not in route:
        route.append(name)
        name = hosts[name].ssh_for(control=control).via or ""
    return route


class ExporterSettings(ConfigModel):
    url: Endpoint = Endpoint(url="http://127.0.0.1:9999")
    token: OwnToken | None = None
    heartbeats: HeartbeatSettings = HeartbeatSettings()
    modules_file: ExistingFile | None = None
    modules_targets: Annotated[list[TargetPattern], Field(min_length=1)] | None = None  # None: any

    @model_validator(mode="after")
    def _check_modules(self) -> "ExporterSettings":
        if self.modules_targets is not None and self.modules_file is None:
            raise ValueError("modules_targets needs modules_file")
        return self


class EventSettings(ConfigModel):
    """How long the events copied from the exporter are stored, and how many at most."""

    retention: PositiveDuration = 90 * 86400.0
    max_entries: int = Field(1_000_000, ge=1000)


def _check_ping_interval(seconds: float) -> float:
    if not MIN_PING_INTERVAL <= seconds <= MAX_PING_INTERVAL:
        raise ValueError(f"{format_duration(seconds)} is not between 1s and 10m")
    return seconds


class DeadManSettings(ConfigModel):
    """A watcher outside: the URL that is requested while alerts can be processed and notifications sent."""

    url: SecretUrl
    every: Annotated[PositiveDuration, AfterValidator(_check_ping_interval)] = 60.0


class RemediatorSettings(ConfigModel):
    url: Endpoint = Endpoint(url="http://127.0.0.1:9095")
    database: str = "sqlite:////var/lib/defib/remediator.db"
    token: OwnToken | None = None
    webhook_token: OwnToken | None = None
    prometheus_url: Endpoint | None = None
    alertmanager_url: Endpoint | None = None
    grafana_url: Endpoint | None = None
    watchdog: Duration = 300.0
    retention: PositiveDuration = 90 * 86400.0
    events: EventSettings = EventSettings()
    dead_man: DeadManSettings | None = None

    @field_validator("database", mode="before")
    @classmethod
    def _check_database(cls, url: Any) -> Any:
        if not isinstance(url, str) or not url.startswith("sqlite:///") or url == "sqlite:///":
            raise ValueError("must be sqlite:///PATH (four slashes before an absolute path)")
        path = url.removeprefix("sqlite:///")
        return f"sqlite:///{url.base / path}" if isinstance(url, TextWithBase) else url

    @property
    def token_file(self) -> Path | None:
        """The file of the local token where no setting has it, in the database's folder; None where that is unknown."""
        if "${" in self.database:  # a reference that this program leaves unresolved
            return None
        return Path(self.database.removeprefix("sqlite:///")).parent / "token"


Server = Literal["exporter", "remediator", "gateway"]
_LIMITED = ("remediator.webhook_token", "access.metrics_token")
_UNLIMITED = ("exporter.token", "remediator.token", "gateway.token")


class Template(ConfigModel):
    """A service with parameters, which `fleet.inventory.expansion` fills in."""

    for_hosts: HostSelector | None = None
    id: str | None = None
    parameters: dict[Annotated[str, Field(pattern=LABEL_NAME)], Any] = Field(default_factory=dict)
    service: dict[str, Any]


class ServiceSource(ChoiceModel):
    """Targets from which a template makes services: files, or the address of a server for Prometheus' http_sd."""

    choices: ClassVar[tuple[str, ...]] = ("file", "http")
    file: str | list[str] | None = None
    http: Endpoint | None = None
    refresh: PositiveDuration = 60.0  # how often the server is asked
    template: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @field_validator("file")
    @classmethod
    def _check_paths(cls, file: str | list[str] | None) -> str | list[str] | None:
        if any("\0" in each for each in as_list(file)):
            raise ValueError("a path cannot contain a null character")
        return file


class Defaults(ConfigModel):
    probe: ProbeSettings = ProbeSettings()
    control: ControlSettings = ControlSettings()
    thresholds: ServiceThresholds = ServiceThresholds()
    # Hosts have these already.
    host: Any = Field(None, exclude=True)
    groups: dict[str, Any] = Field(default_factory=dict, exclude=True)


class Inventory(ConfigModel):
    exporter: ExporterSettings = ExporterSettings()
    remediator: RemediatorSettings = RemediatorSettings()
    gateway: GatewaySettings = GatewaySettings()
    defaults: Defaults = Defaults()
    templates: dict[Identifier, Template] = Field(default_factory=dict, exclude=True)
    services_from: dict[Identifier, ServiceSource] = Field(default_factory=dict, exclude=True)
    remediation: Remediation = Remediation()
    notify: Notify = Notify()
    access: Access = Access()
    hosts: dict[Identifier, Host] = Field(default_factory=dict)
    services: dict[Identifier, Service] = Field(default_factory=dict)
    runbooks: dict[Identifier, Runbook] = Field(default_factory=dict)
    _by_target: dict[tuple[str, str], list[str]] = PrivateAttr(default_factory=dict)
    _host_alerts: dict[str, HostAlert] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _set_names(self) -> "Inventory":
        for key, host in self.hosts.items():
            host._name = key  # noqa: SLF001 - the name is the map's key
        for key, service in self.services.items():
            service._id = key  # noqa: SLF001 - as above
            target = service.control.options.target if isinstance(service.control, Control) else ""
            service._target = target or f"service:{key}"  # noqa: SLF001 - as above
        self._index_targets()
        self._host_alerts = {each.id: each for each in self._find_host_alerts()}
        return self

    @property
    def has_heartbeats(self) -> bool:
        """Whether the exporter receives pings: a service reports itself, or jobs may create heartbeats."""
        has_any = any(service.probe.is_reported for service in self.services.values())
        return has_any or self.exporter.heartbeats.create is not None

    def _find_host_alerts(self) -> Iterator[HostAlert]:
        """Yield the alerts of each host that have runbooks."""
        steps: dict[tuple[str, str], list[RemediationStep]] = {}
        for name, runbook in self.runbooks.items():
            lists = (runbook.alerts, runbook.own_alerts)
            alerts = [alert for each in lists if isinstance(each, list) for alert in each]  # else a reference
            step = RunbookStep(name=name, runbook=runbook)
            for host in self.hosts_of_runbook(runbook):
                for alert in dict.fromkeys(alerts):
                    steps.setdefault((alert, host.name), []).append(step)
        for (alert, host_name), each in steps.items():
            yield HostAlert(alert, host_name, ServiceRemediation(alerts=[alert], steps=each))

    def hosts_of_runbook(self, runbook: Runbook) -> list[Host]:
        """Return the hosts that a runbook is for."""
        selector = runbook.hosts.model_dump(exclude_unset=True) if runbook.hosts is not None else None
        return [
            host
            for host in self.hosts.values()
            if (host.has_shell if selector is None else matches_host(selector, host.name, host.group, host.labels))
        ]

    @property
    def host_alerts(self) -> Mapping[str, HostAlert]:
        """The alerts of hosts that have runbooks, by their IDs."""
        return self._host_alerts

    def find_subject(self, subject: str) -> "Remediable | None":
        """Return the service, or the alert of a host, that an incident is about."""
        return self.services.get(subject) or self._host_alerts.get(subject)

    def find_subject_of_alert(self, alert: str, labels: Mapping[str, str]) -> "Remediable | None":
        """Return what an alert with these labels opens an incident of."""
        if "service" in labels:
            return self.services.get(labels["service"])
        return self._host_alerts.get(f"{alert}@{labels.get('host', '')}")

    def _index_targets(self) -> None:
        self._by_target = {}
        for name, service in self.services.items():
            self._by_target.setdefault((service.host, service.target), []).append(name)

    def mask_targets(self, redact: Callable[[str], str]) -> None:
        """Redact the names of the services' targets and the commands of runbooks."""
        for runbook in self.runbooks.values():
            runbook.mask_command(redact)
        for service in self.services.values():
            service._target = redact(service._target)  # noqa: SLF001 - set by this class only
        self._index_targets()

    def services_sharing_target(self, service: Remediable) -> list[str]:
        """Return the IDs of the services that share the target of `service` on its host, its own included.

        `service` may be of an earlier configuration, and its target of no service of this one.
        """
        sharing = self._by_target.get((service.host, service.target), [])
        return sharing if service.id in sharing else [service.id, *sharing]

    @model_validator(mode="after")
    def _check_retention(self) -> "Inventory":
        rules = [self.remediation, *(self.remediation.for_service(service) for service in self.services.values())]
        # A reference that is not resolved is text.
        longest = max([600.0, *(each.window for each in rules if isinstance(each.window, float))])
        if isinstance(self.remediator.retention, float) and self.remediator.retention < longest:
            raise ValueError("remediator.retention: must be at least 10m, and no shorter than any remediation.window")
        return self

    def local_token(self, program: Server) -> ConfiguredToken:
        """Return the token that permits everything in a program: that of its setting, else the local token's file."""
        tokens = {
            "exporter": self.exporter.token,
            "remediator": self.remediator.token,
            "gateway": self.gateway.token,
        }
        setting, value = f"{program}.token", tokens[program]
        file = self.remediator.token_file if value is None else None
        return ConfiguredToken(setting, value, file, owned=file is not None)

    @model_validator(mode="after")
    def _check_tokens(self) -> "Inventory":
        """Check that no token has the rights of another one."""
        settings = {
            "exporter.token": self.exporter.token,
            "remediator.token": self.remediator.token,
            "gateway.token": self.gateway.token,
            "remediator.webhook_token": self.remediator.webhook_token,
            "access.metrics_token": self.access.metrics_token,
        }
        tokens = {name: token.get_secret_value() for name, token in settings.items() if isinstance(token, SecretStr)}
        for one, other in (("remediator.webhook_token", "access.metrics_token"), *product(_LIMITED, _UNLIMITED)):
            if one in tokens and tokens[one] == tokens.get(other):
                raise ValueError(f"{one}: must differ from {other}")
        for name, client in self.gateway.clients.items():
            if isinstance(client.token, SecretStr) and client.token.get_secret_value() in tokens.values():
                raise ValueError(f"gateway.clients.{name}.token: must differ from the tokens of Defib's servers")
        return self

    def host_of(self, service: Remediable) -> Host | None:
        return self.hosts.get(service.host)


@cache
def inventory_model(kinds: KindTables) -> type[Inventory]:
    """Return the inventory's model with the options of `kinds`.

    The same kinds give the same class, so that two loaded inventories can be compared.
    """
    probe: Any = _one_of("Probe", Probe, kinds.probes)
    control: Any = _one_of("Control", Control, kinds.controls)
    channel: Any = _one_of("Channel", Channel, kinds.channels)
    collect: Any = create_model("Collect", __base__=Collect, **_fields(kinds.collectors))
    host: Any = create_model("Host", __base__=Host, collect=(collect, Field(default_factory=collect)))
    host_defaults: Any = create_model("HostDefaults", __base__=host, address=(str | None, None))
    groups: Any = (dict[str, host_defaults], Field(default_factory=dict, exclude=True))
    of_hosts: Any = (host_defaults | None, Field(None, exclude=True))
    defaults: Any = create_model("Defaults", __base__=Defaults, host=of_hosts, groups=groups)
    service: Any = create_model("Service", __base__=Service, probe=(probe, ...), control=(control | None, None))
    channels: Any = (dict[Identifier, channel], Field(default_factory=dict))
    notify: Any = create_model("Notify", __base__=Notify, channels=channels)
    services: Any = (dict[Identifier, service], Field(default_factory=dict))
    hosts: Any = (dict[Identifier, host], Field(default_factory=dict))
    return create_model(
        "Inventory", __base__=Inventory, notify=(notify, Field(default_factory=notify)), services=services, hosts=hosts,
        defaults=(defaults, Field(default_factory=defaults)),
    )  # fmt: skip


def _one_of(name: str, base: type[ChoiceModel], kinds: Mapping[str, ConfigurableKind]) -> type[ChoiceModel]:
    class Chosen(base):  # type: ignore[misc, valid-type]  # the base class is a parameter
        choices: ClassVar[tuple[str, ...]] = tuple(kinds)

    return cast("type[ChoiceModel]", create_model(name, __base__=Chosen, **_fields(kinds)))


def _fields(kinds: Mapping[str, ConfigurableKind]) -> dict[str, Any]:
    """Return one optional field for each kind."""
    return {name: (Annotated[Any, KindOptions(kinds, name)], None) for name in kinds}
