"""Roles, what each permits, and the identity of a caller."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Literal


class Role(StrEnum):
    """What a caller may do. `METRICS` and `WEBHOOK` are the roles of the two tokens that permit nothing else.

    `CLIENT` is that of the gateway's clients, who may only send requests to model APIs.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    METRICS = "metrics"
    WEBHOOK = "webhook"
    CLIENT = "client"


UserRole = Literal["viewer", "operator", "admin"]  # the roles of people and API tokens, as in the configuration


class AccessRequirement(Enum):
    """What a route requires of its callers."""

    UNCHECKED = auto()  # nothing: health, and requests with a signature of their own
    PUBLIC = auto()  # nothing, but requests of other sites are refused: the pages for signing in
    SCRAPE = auto()  # metrics
    TARGETS = auto()  # probes of targets that the caller chooses
    WEBHOOK = auto()  # deliveries of alerts
    VIEWER = auto()  # everything but logs and evidence
    OPERATOR = auto()  # logs, evidence, and operations on services, incidents and alerts
    ADMIN = auto()  # automation, the configuration, tokens, sessions, the audit log


_PERMITTED: Mapping[Role, frozenset[AccessRequirement]] = {
    Role.METRICS: frozenset({AccessRequirement.SCRAPE, AccessRequirement.TARGETS}),
    Role.WEBHOOK: frozenset({AccessRequirement.WEBHOOK}),
    Role.CLIENT: frozenset(),
    Role.VIEWER: frozenset({AccessRequirement.SCRAPE, AccessRequirement.VIEWER}),
    Role.OPERATOR: frozenset({AccessRequirement.SCRAPE, AccessRequirement.VIEWER, AccessRequirement.OPERATOR}),
    Role.ADMIN: frozenset(AccessRequirement),
}
_OPEN = frozenset({AccessRequirement.UNCHECKED, AccessRequirement.PUBLIC})


def permits(role: Role, requirement: AccessRequirement) -> bool:
    return requirement in _OPEN or requirement in _PERMITTED[role]


def least_role(requirement: AccessRequirement) -> Role:
    """Return the role with the fewest rights that meets a requirement."""
    return next(role for role in USER_ROLES if permits(role, requirement))


USER_ROLES = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)  # by their rights

# How a caller was authenticated: a session of the console, a proxy in front of it, a password in the request, a token,
# the local token (the command line), or a chat.
Means = Literal["console", "proxy", "password", "token", "cli", "chat"]
SignInMethod = Literal["password", "oidc", "feishu", "token"]


@dataclass(frozen=True)
class Identity:
    """An authenticated caller. `claimed_user` is the operating system's user, which only the caller vouches for."""

    name: str
    role: Role
    means: Means
    address: str = ""
    claimed_user: str = ""
    method: SignInMethod = "password"

    @property
    def label(self) -> str:
        """The name for the record and for people. Only a user of the web configuration has no mark after the name."""
        if self.claimed_user:
            return f"{self.name} ({self.claimed_user}, unverified)"
        return f"{self.name} (token)" if self.means == "token" else signed_in_label(self.name, self.method)


def signed_in_label(name: str, method: SignInMethod) -> str:
    """Return the name of somebody who signed in; a user of another service may have the name of a user here."""
    return name if method == "password" else f"{name} ({method})"


USER_HEADER = "X-Defib-User"  # the operating system's user of a caller with the local token
LOCAL, UNNAMED = "local", "unnamed"  # the name of callers with the local token, and of their user if they send none


def can_be_recorded(name: str) -> bool:
    """Whether a name from elsewhere can be recorded as it is: different people must not be recorded under one name."""
    return name != "" and printable_name(name) == name


# Characters that are shown as nothing or as a space, although Python calls them printable: Default_Ignorable_Code_Point
# of Unicode, and signs whose glyphs are empty. https://www.unicode.org/Public/UCD/latest/ucd/DerivedCoreProperties.txt
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U00013441\U00013442\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable_name(text: str) -> str:
    """Return the first 60 visible characters of a name from elsewhere, without parentheses, which mark names here.

    The same letters with accents are the same characters in it (NFC).
    """
    visible = "".join(character for character in _INVISIBLE.sub("", text) if character.isprintable())
    return unicodedata.normalize("NFC", visible.replace("(", "").replace(")", "")).strip()[:60]
