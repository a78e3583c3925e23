"""What `defib init` needs to know: from options, and from a person at a terminal."""

import getpass
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from defib.output import print_text
from fleet.inventory.endpoints import check_host_and_port, check_url
from fleet.inventory.expansion import fill_number
from fleet.inventory.heartbeats import check_listen
from fleet.inventory.notify import Language, check_timezone
from fleet.inventory.units import IDENTIFIER
from runtime.access.roles import UserRole
from runtime.errors import DefibError
from runtime.tokens import TokenError, read_secret_file

T = TypeVar("T")
Mode = Literal["checkout", "systemd", "compose"]
_ADDRESS = re.compile(r"[A-Za-z0-9._:%{}+-]+")
_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(?:\[([0-9]{1,6})-([0-9]{1,6})\][a-z0-9._-]*)?")
ADMIN_NAME, THIS_MACHINE = "admin", "here"
MOST_HOSTS = 10_000  # of a range
_MAIL = re.compile(r"[^@\s\"'<>]+@[A-Za-z0-9.-]+")


@dataclass(frozen=True)
class User:
    """A user of the console."""

    name: str
    role: UserRole = "operator"


@dataclass(frozen=True)
class Answers:
    """What the files depend on. Hosts are names, which may be ranges, with their addresses."""

    mode: Mode = "checkout"
    public_url: str = ""
    ping_listen: str = ""
    language: Language = "zh"
    timezone: str = "Asia/Shanghai"
    feishu_webhook: str = field(default="", repr=False)
    feishu_secret: str = field(default="", repr=False)
    hosts: tuple[tuple[str, str], ...] = ()
    users: tuple[User, ...] = ()
    fallback_mail: str = ""
    smtp: str = ""
    fallback_webhook: str = field(default="", repr=False)

    @property
    def has_watcher(self) -> bool:
        """Whether Alertmanager sends problems of Defib itself to the watcher, `defib deadman`."""
        return not (self.fallback_mail or self.fallback_webhook)


def parse_host(text: str) -> tuple[str, str]:
    """Return the name and the address of `NAME=ADDRESS`, both perhaps of a range. Raises ValueError."""
    name, separator, address = text.partition("=")
    range_ = _HOST_NAME.fullmatch(name)
    if not separator or range_ is None or _ADDRESS.fullmatch(address) is None:
        raise ValueError(f"{text!r} is not a host; write gpu-01=10.0.0.11, or 'gpu-[01-20]=10.0.0.{{n}}'")
    if name == THIS_MACHINE:
        raise ValueError(f"{name!r} is the name of this machine; choose another one")
    first, last = (int(range_[each]) if range_[each] else 0 for each in (1, 2))
    if first > last or last - first >= MOST_HOSTS:
        raise ValueError(f"{name!r}: the range must begin before it ends, and have at most {MOST_HOSTS} hosts")
    addresses = {fill_number(number, address) for number in (first, last)}
    if len(addresses) < len({first, last}):
        raise ValueError(f"{address!r} is the same for all hosts; write the number of a host as {{n}}")
    for each in addresses:
        _check_address(each)
    return name, address


def _check_address(address: str) -> None:
    """Raise ValueError unless this is a name or an IP address."""
    if re.fullmatch(r"[0-9.]+", address) is not None or ":" in address:
        ip_address(address)
    elif re.fullmatch(r"[A-Za-z0-9._-]+", address) is None:
        raise ValueError(f"{address!r} is not an address")


def parse_hosts(text: str) -> tuple[tuple[str, str], ...]:
    """Return hosts that are separated by spaces. Raises ValueError."""
    hosts = tuple(map(parse_host, text.split()))
    check_unique([name for name, _ in hosts])
    return hosts


def parse_user(text: str) -> User:
    """Return the user of `NAME` or `NAME=ROLE`. Raises ValueError."""
    name, _, role = text.partition("=")
    if re.fullmatch(IDENTIFIER, name) is None or (role or "operator") not in get_args(UserRole):
        raise ValueError(f"{text!r} is not a user; write ann, or ann=admin (roles: {', '.join(get_args(UserRole))})")
    if name == ADMIN_NAME:
        raise ValueError(f"{name!r} exists in any case, with the role admin")
    return User(name, role or "operator")  # type: ignore[arg-type]  # checked above


def parse_users(text: str) -> tuple[User, ...]:
    """Return users that are separated by spaces. Raises ValueError."""
    users = tuple(map(parse_user, text.split()))
    check_unique([each.name for each in users])
    return users


def check_unique(names: Sequence[str]) -> None:
    """Raise ValueError if a name is given twice."""
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise ValueError(f"{twice} is given twice")


def parse_url(text: str) -> str:
    """Return a URL, or an empty text. Raises ValueError."""
    if "@" in urlsplit(text).netloc:
        raise ValueError("must not contain credentials")
    return check_url(text) if text else ""


def parse_ping_listen(text: str) -> str:
    """Return an IP address and port for pings, or an empty text. Raises ValueError."""
    if not text:
        return ""
    address, _, _ = check_listen(text).rpartition(":")
    try:
        is_one = not ip_address(address.strip("[]")).is_unspecified
    except ValueError:
        is_one = False
    if not is_one:
        raise ValueError(f"{text!r} is not an address that jobs can reach; write 10.0.0.5:9998 or [v6]:9998")
    return text


def parse_mail(text: str) -> str:
    """Return an e-mail address, or an empty text. Raises ValueError."""
    if text and _MAIL.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not an e-mail address")
    return text


def parse_smtp(text: str) -> str:
    """Return the address of a mail server, or an empty text. Raises ValueError."""
    return check_host_and_port(text) if text else ""


def parse_mode(text: str) -> Mode:
    """Return how Defib is run. Raises ValueError."""
    if text.lower() not in get_args(Mode):
        raise ValueError("write checkout, systemd or compose")
    return text.lower()  # type: ignore[return-value]  # checked above


def parse_language(text: str) -> Language:
    """Return the language of notifications. Raises ValueError."""
    if text.lower() not in get_args(Language):
        raise ValueError(f"write {' or '.join(get_args(Language))}")
    return text.lower()  # type: ignore[return-value]  # checked above


def _read_option(name: str, parse: Callable[[Any], T], value: Any) -> T:
    """Return the value of an option. Raises DefibError."""
    try:
        return parse(value)
    except (ValueError, TokenError) as error:
        raise DefibError(f"argument --{name.replace('_', '-')}: {error}") from error


def check(answers: Answers) -> Answers:
    """Return the answers, if they fit together. Raises DefibError."""
    if bool(answers.fallback_mail) != bool(answers.smtp):
        raise DefibError("argument --fallback-mail: needs --smtp HOST:PORT, and the other way round")
    if answers.feishu_secret and not answers.feishu_webhook:
        raise DefibError("argument --feishu-secret: needs --feishu-webhook")
    return answers


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "mode": parse_mode, "public_url": parse_url, "ping_listen": parse_ping_listen,
    "language": parse_language, "timezone": check_timezone, "fallback_mail": parse_mail, "smtp": parse_smtp,
}  # fmt: skip


def from_options(options: Any) -> tuple[Sequence[str], Answers]:
    """Return the names of the answers that options give, and the answers. Raises DefibError."""
    given: dict[str, Any] = {}
    for name, parse in _PARSERS.items():
        if (value := getattr(options, name)) is not None:
            given[name] = _read_option(name, parse, value)
    for name in ("feishu_webhook", "feishu_secret", "fallback_webhook"):
        if (path := getattr(options, name)) is not None:
            given[name] = _read_option(name, read_secret_file, path)
    for name in ("feishu_webhook", "fallback_webhook"):
        if name in given:
            _read_option(name, parse_url, given[name])
    for name, parse_all in (("hosts", parse_hosts), ("users", parse_users)):
        if (values := getattr(options, name)) is not None:
            given[name] = _read_option(name.removesuffix("s"), parse_all, " ".join(values))
    return list(given), Answers(**given)


@dataclass(frozen=True)
class _Question:
    """A question for a person, whose answer `parse` turns into a field of Answers."""

    name: str  # of the field
    text: str
    parse: Callable[[str], Any]
    after: str = ""  # the field without which it is not asked
    secret: bool = False


_QUESTIONS = (
    _Question("mode", "Run it by hand, with systemd, or with docker compose? checkout, systemd or compose", parse_mode),
    _Question("public_url", "The console's address for browsers, https://…; empty: this machine only", parse_url),
    _Question(
        "ping_listen",
        "Address for pings of jobs and agents, such as 10.0.0.5:9998; empty: this machine only",
        parse_ping_listen,
    ),
    _Question("language", "Language of notifications: zh or en", parse_language),
    _Question("timezone", "Time zone", check_timezone),
    _Question("hosts", "First hosts: gpu-01=10.0.0.11 gpu-[02-20]=10.0.0.{n} …; empty: none", parse_hosts),
    _Question("users", "Users of the console beside admin: ann bob=viewer …; empty: none", parse_users),
    _Question("feishu_webhook", "Webhook of a Feishu bot that notifies (hidden); empty: none", parse_url, secret=True),
    _Question("feishu_secret", "Its secret (hidden); empty: none", str, after="feishu_webhook", secret=True),
    _Question("fallback_mail", "E-mail address for problems of Defib itself; empty: none", parse_mail),
    _Question("smtp", "Mail server for it, HOST:PORT", parse_smtp, after="fallback_mail"),
)


def ask(answers: Answers, given: Sequence[str]) -> Answers:
    """Ask a person for what was not given as an option."""
    print_text("Press Enter for what is in brackets.", sys.stderr)
    for question in _QUESTIONS:
        if question.name not in given and (not question.after or getattr(answers, question.after)):
            answers = replace(answers, **{question.name: _ask(question, getattr(answers, question.name))})
    return answers


def _ask(question: _Question, default: Any) -> Any:
    """Ask until the answer is valid."""
    shown = f" [{default}]" if default and isinstance(default, str) else ""
    read = getpass.getpass if question.secret else input
    while True:
        try:
            answer = read(f"{question.text}{shown}: ").strip()
        except EOFError:
            raise DefibError("no answer; nothing was written") from None
        if not answer and default:
            return default
        try:
            return question.parse(answer)
        except ValueError as error:
            print_text(f"  {error}", sys.stderr)
