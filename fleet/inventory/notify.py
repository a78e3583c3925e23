"""Notifications: channels, the routes to them, and the people who may press buttons."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from fleet.inventory.endpoints import ExistingDirectory, OneOf, Part, Url
from fleet.inventory.units import Duration, Identifier, PositiveDuration

Severity = Literal["critical", "warning", "info"]
Language = Literal["zh", "en"]
NotificationKind = Literal[
    "down", "restarted", "could_not_restart", "person_needed", "approval", "waiting", "blind", "stopped_by_hand",
    "recovered", "unobserved", "reminder", "alert", "alert_over", "watchdog_missing", "watchdog_back",
    "automation_off", "automation_on",
]  # fmt: skip
FORMER_STATES: Mapping[str, NotificationKind] = {"gave_up": "person_needed"}
ButtonAction = Literal["acknowledge", "silence", "restart", "approve", "automation"]
OpenId = Annotated[str, Field(pattern=r"^ou_[0-9A-Za-z_-]{1,80}$")]


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


Wanted = Annotated[
    list[str],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _renamed(state: object) -> object:
    return FORMER_STATES.get(state, state) if isinstance(state, str) else state


# A state as a route names it: one that was renamed keeps its former name.
RoutedState = Annotated[
    NotificationKind,
    BeforeValidator(_renamed),
    WithJsonSchema({"type": "string", "enum": [*get_args(NotificationKind), *FORMER_STATES]}),
]


class ChannelOptions(Part):
    """The options of a channel type, and what the sender must know of the channel.

    `bot` identifies what the rate limits hold for. Channels with the same `place` reach the same people.
    """

    per_second: ClassVar[int]
    per_minute: ClassVar[int]
    updatable_for: ClassVar[float | None] = None  # seconds for which a message can be updated; None: not at all
    has_threads: ClassVar[bool] = False  # whether messages can be sent as replies

    @property
    def bot(self) -> str:
        raise NotImplementedError

    @property
    def place(self) -> str:
        return self.bot

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


class Channel(OneOf):
    """Where notifications are sent; the options of the channel's type are under its key."""

    @property
    def settings(self) -> ChannelOptions:
        """Return the options, as what the sender must know of them."""
        options: ChannelOptions = self.options
        return options


class Person(Part):
    """Somebody who may press a card's buttons."""

    open_id: OpenId
    name: str = ""
    may: list[ButtonAction] = list(get_args(ButtonAction))


class Escalation(Part):
    """After each `after` in which nobody acknowledged, the next of `channels` is told too."""

    after: PositiveDuration
    channels: Annotated[list[str], Field(min_length=1)]


class Links(Part):
    """Where people's browsers reach what the remediator may reach by another name."""

    remediator: Url | None = None
    alertmanager: Url | None = None
    grafana: Url | None = None
    docs: Url | None = None


class Route(Part):
    match: dict[str, Wanted] = Field(default_factory=dict)
    states: list[RoutedState] = []
    channels: list[str]
    on_call: list[str] = []
    escalate: Escalation | None = None
    remind: PositiveDuration | None = None
    continue_: bool = Field(False, alias="continue")

    def takes(self, labels: Mapping[str, str], told: NotificationKind) -> bool:
        """Whether labels and what is told are of this route."""
        return (not self.states or told in self.states) and all(
            labels.get(name, "") in wanted for name, wanted in self.match.items()
        )


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("is not a time zone (write Asia/Shanghai)") from None
    return name


class Notify(Part):
    language: Language = "zh"
    # Validating reads the zone's file, so that nobody has to later, in the event loop.
    timezone: Annotated[str, AfterValidator(_timezone)] = Field("Asia/Shanghai", validate_default=True)
    templates: ExistingDirectory | None = None
    group_wait: Duration = 2.0
    links: Links = Links()
    people: dict[Identifier, Person] = Field(default_factory=dict)
    channels: dict[Identifier, Channel] = Field(default_factory=dict)
    routes: list[Route] = []

    @model_validator(mode="after")
    def _tell_people_apart(self) -> "Notify":
        of: dict[str, str] = {}
        for name, person in self.people.items():
            if of.setdefault(person.open_id, name) != name:
                raise ValueError(f"people: {name} and {of[person.open_id]} have the same open_id")
        return self

    def routes_for(self, labels: Mapping[str, str], told: NotificationKind) -> list[Route]:
        """The first route that takes it, and those after it while each continues."""
        chosen: list[Route] = []
        for route in self.routes:
            if route.takes(labels, told):
                chosen.append(route)
                if not route.continue_:
                    break
        return chosen

    def channels_for(self, labels: Mapping[str, str], told: NotificationKind) -> list[str]:
        """Name the channels that hear of it."""
        return self._one_for_each_place(
            channel for route in self.routes_for(labels, told) for channel in route.channels
        )

    def channels_after(self, begun: Iterable[str], labels: Mapping[str, str], told: NotificationKind) -> list[str]:
        """Name the channels that hear how something goes on, of whose beginning the channels `begun` were told.

        Those are they, but for what their routes' `states` leave out; and those whose route names just this state.
        """
        now = self.channels_for(labels, told)
        left_out = {*self.channels_for(labels, "down"), *self.channels_for(labels, "alert")} - set(now)
        asked = (channel for route in self.routes_for(labels, told) if route.states for channel in route.channels)
        return self._one_for_each_place([*(channel for channel in begun if channel not in left_out), *asked])

    def remind_every(self, channel: str, labels: Mapping[str, str], told: NotificationKind, default: float) -> float:
        """How often a channel is reminded, by the first of its routes that says so."""
        routes = [*self.routes_for(labels, told), *self.routes_for(labels, "down")]
        said = (route.remind for route in routes if channel in route.channels and route.remind is not None)
        return next(said, default)

    def _one_for_each_place(self, names: Iterable[str]) -> list[str]:
        """Each channel once, and of those that lead to one place the first: nobody is told twice."""
        first: dict[object, str] = {}
        for name in names:
            known = self.channels.get(name)
            first.setdefault(known.settings.place if known is not None else name, name)
        return list(first.values())

    def on_call(self, labels: Mapping[str, str], told: NotificationKind) -> list[Person]:
        """Who is on call for a trouble, by the routes that tell this of it, or its beginning."""
        begins: tuple[NotificationKind, ...] = (told, "down", "alert")
        routes = (route for each in begins for route in self.routes_for(labels, each))
        names = _once(name for route in routes for name in route.on_call)
        return [self.people[name] for name in names if name in self.people]

    def person(self, open_id: str) -> tuple[str, Person] | None:
        """The person with an open_id, and their name in the inventory."""
        return next(((name, each) for name, each in self.people.items() if each.open_id == open_id), None)

    def updates_messages(self, channel: str) -> bool:
        """Whether sent messages of a channel can be updated."""
        known = self.channels.get(channel)
        return known is not None and known.settings.updatable_for is not None


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
