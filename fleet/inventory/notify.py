"""Notification settings: channels, routes to them, escalation, and the people who may press buttons."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from fleet.inventory.calendars import Calendar, Shift
from fleet.inventory.endpoints import ChoiceModel, ConfigModel, ExistingDirectory, Url
from fleet.inventory.report_times import Reports
from fleet.inventory.units import Duration, Identifier, PositiveDuration
from runtime.access.roles import AccessRequirement, Role, UserRole, permits

Severity = Literal["critical", "warning", "info"]
Language = Literal["zh", "en"]
RoutedKind = Literal[
    "down", "restarted", "could_not_restart", "person_needed", "approval", "waiting", "storm", "blind",
    "stopped_by_hand", "recovered", "unobserved", "reminder", "alert", "alert_over", "watchdog_missing",
    "watchdog_back", "automation_off", "automation_on",
]  # fmt: skip
NotificationKind = Literal[RoutedKind, "report"]  # reports have channels of their own
FORMER_STATES: Mapping[str, RoutedKind] = {"gave_up": "person_needed"}
ButtonAction = Literal["acknowledge", "silence", "restart", "approve", "storm", "automation"]
OpenId = Annotated[str, Field(pattern=r"^ou_[0-9A-Za-z_-]{1,80}$")]


def _list_of_one(value: object) -> object:
    return [value] if isinstance(value, str) else value


LabelValues = Annotated[
    list[str],
    BeforeValidator(_list_of_one),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _rename_state(state: object) -> object:
    return FORMER_STATES.get(state, state) if isinstance(state, str) else state


# A state as a route names it; former names of states still work.
RoutedState = Annotated[
    RoutedKind,
    BeforeValidator(_rename_state),
    WithJsonSchema({"type": "string", "enum": [*get_args(RoutedKind), *FORMER_STATES]}),
]


class ChannelOptions(ConfigModel):
    """The options of a channel type, and what the sender must know of the channel.

    `bot_id` identifies what the rate limits hold for. Channels with the same `audience_id` reach the same people.
    """

    per_second: ClassVar[int]
    per_minute: ClassVar[int]
    updatable_for: ClassVar[float | None] = None  # seconds for which a message can be updated; None: not at all
    has_threads: ClassVar[bool] = False  # whether messages can be sent as replies

    @property
    def bot_id(self) -> str:
        raise NotImplementedError

    @property
    def audience_id(self) -> str:
        return self.bot_id

    @property
    def address(self) -> str:
        """Return the URL that messages are sent to; it may contain secrets."""
        raise NotImplementedError

    @property
    def has_buttons(self) -> bool:
        """Whether pressed buttons reach the remediator."""
        return False

    def mentions(self, severity: Severity) -> Sequence[str]:
        """Return who is mentioned: user ids, `all`, and `on_call` for the people on call."""
        del severity
        return ()


class Channel(ChoiceModel):
    """Where notifications are sent; the options of the channel's type are under its key."""

    @property
    def settings(self) -> ChannelOptions:
        """Return the options, as what the sender must know of them."""
        options: ChannelOptions = self.options
        return options


class Person(ConfigModel):
    """A person who may press the buttons of cards and, with a `role`, sign in with Feishu."""

    open_id: OpenId
    name: str = ""
    may: list[ButtonAction] | None = None
    role: UserRole | None = None

    def may_press(self, button: ButtonAction) -> bool:
        """Whether the person may use a button: if it is in `may`, and if their role permits it.

        Without a role, `may` alone decides; without both, the person is an operator.
        """
        requirement = AccessRequirement.ADMIN if button == "automation" else AccessRequirement.OPERATOR
        if self.may is not None and (self.role is None or button not in self.may):
            return button in self.may
        return permits(Role(self.role or "operator"), requirement)


class Escalation(ConfigModel):
    """Notifies the next of `channels` after each `after` without an acknowledgement."""

    after: PositiveDuration
    channels: Annotated[list[str], Field(min_length=1)]


class Links(ConfigModel):
    """URLs for browsers, where they differ from those that the remediator uses."""

    remediator: Url | None = None
    alertmanager: Url | None = None
    grafana: Url | None = None
    docs: Url | None = None


class Route(ConfigModel):
    match: dict[str, LabelValues] = Field(default_factory=dict)
    states: list[RoutedState] = []
    channels: list[str]
    on_call: list[str] = []
    escalate: Escalation | None = None
    remind: PositiveDuration | None = None
    continue_: bool = Field(False, alias="continue")

    def matches(self, labels: Mapping[str, str], kind: NotificationKind) -> bool:
        return (not self.states or kind in self.states) and all(
            labels.get(name, "") in values for name, values in self.match.items()
        )


def check_timezone(name: str) -> str:
    """Return the name of a time zone. Raises ValueError."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is not a time zone; write Asia/Shanghai") from None
    return name


class Notify(ConfigModel):
    language: Language = "zh"
    # Validation reads the zone's file, which would otherwise block the event loop later.
    timezone: Annotated[str, AfterValidator(check_timezone)] = Field("Asia/Shanghai", validate_default=True)
    templates: ExistingDirectory | None = None
    group_wait: Duration = 2.0
    digest_over: int = Field(8, ge=1)  # problems that begin on a channel within a minute
    links: Links = Links()
    people: dict[Identifier, Person] = Field(default_factory=dict)
    calendars: dict[Identifier, Calendar] = Field(default_factory=dict)
    channels: dict[Identifier, Channel] = Field(default_factory=dict)
    routes: list[Route] = []
    reports: Reports | None = None

    @model_validator(mode="after")
    def _check_open_ids(self) -> "Notify":
        names: dict[str, str] = {}
        for name, person in self.people.items():
            if names.setdefault(person.open_id, name) != name:
                raise ValueError(f"people: {name} and {names[person.open_id]} have the same open_id")
        return self

    def routes_for(self, labels: Mapping[str, str], kind: NotificationKind) -> list[Route]:
        """Return the first route that matches, and those after it while each has `continue`."""
        routes: list[Route] = []
        for route in self.routes:
            if route.matches(labels, kind):
                routes.append(route)
                if not route.continue_:
                    break
        return routes

    def channels_for(self, labels: Mapping[str, str], kind: NotificationKind) -> list[str]:
        """Return the names of the channels that receive a notification."""
        return self._drop_same_place(channel for route in self.routes_for(labels, kind) for channel in route.channels)

    def report_channels(self) -> list[str]:
        """Return the names of the channels that receive reports."""
        return self._drop_same_place(self.reports.channels if self.reports is not None else ())

    def follow_up_channels(
        self, notified: Iterable[str], labels: Mapping[str, str], kind: NotificationKind
    ) -> list[str]:
        """Return the names of the channels that receive a follow-up of an incident that `notified` received.

        These are the same channels without those that their routes' `states` exclude, and those whose route names
        this very state.
        """
        now = self.channels_for(labels, kind)
        excluded = {*self.channels_for(labels, "down"), *self.channels_for(labels, "alert")} - set(now)
        added = (channel for route in self.routes_for(labels, kind) if route.states for channel in route.channels)
        return self._drop_same_place([*(channel for channel in notified if channel not in excluded), *added])

    def reminder_interval(
        self, channel: str, labels: Mapping[str, str], kind: NotificationKind, default: float
    ) -> float:
        """Return the seconds between reminders to a channel, from its first route with `remind`."""
        routes = [*self.routes_for(labels, kind), *self.routes_for(labels, "down")]
        intervals = (route.remind for route in routes if channel in route.channels and route.remind is not None)
        return next(intervals, default)

    def _drop_same_place(self, names: Iterable[str]) -> list[str]:
        """Return each channel once, and only the first of those that lead to the same place."""
        first: dict[object, str] = {}
        for name in names:
            known = self.channels.get(name)
            first.setdefault(known.settings.audience_id if known is not None else name, name)
        return list(first.values())

    def on_call(self, labels: Mapping[str, str], kind: NotificationKind, at: float) -> list[Person]:
        """Return who is on call at a Unix time, by the routes for a notification and for the start of its incident."""
        kinds: tuple[NotificationKind, ...] = (kind, "down", "alert")
        routes = (route for each in kinds for route in self.routes_for(labels, each))
        listed = dict.fromkeys(name for route in routes for name in route.on_call)
        zone = ZoneInfo(self.timezone)
        names = dict.fromkeys(
            self.calendars[name].find_person(at, zone) if name in self.calendars else name for name in listed
        )
        return [self.people[name] for name in names if name in self.people]

    def find_shifts(self, at: float) -> dict[str, Shift]:
        """Return who is on call at a Unix time, and until when, by calendar."""
        zone = ZoneInfo(self.timezone)
        return {name: calendar.find_shift(at, zone) for name, calendar in self.calendars.items()}

    def name_of(self, person: str) -> str:
        """Return the name of a person as it is shown: their key, unless they have a `name`."""
        known = self.people.get(person)
        return known.name or person if known is not None else person

    def person(self, open_id: str) -> tuple[str, Person] | None:
        """Return the person with an open_id, with their name in the inventory."""
        return next(((name, each) for name, each in self.people.items() if each.open_id == open_id), None)

    def can_update_cards(self, channel: str) -> bool:
        """Whether messages that were sent to a channel can be changed."""
        known = self.channels.get(channel)
        return known is not None and known.settings.updatable_for is not None
