"""The `--web.config.file`, as Prometheus exporters have it: TLS, headers and users, and the users' roles.

Format: https://prometheus.io/docs/prometheus/latest/configuration/https/
"""

import asyncio
import os
import re
import ssl
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import bcrypt
import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from runtime.access.control import WebUsers
from runtime.access.roles import Role, UserRole
from runtime.errors import StartError
from runtime.tls import restrict_key_exchange
from runtime.validation_messages import MESSAGES, describe
from runtime.yaml_errors import explain_yaml_error
from runtime.yaml_loading import INVALID_VALUES, load_unique

CHECK_EVERY = 1.0  # seconds
log = structlog.get_logger()
_MESSAGES = {**MESSAGES, "string_type": "must be text, in quotes"}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token of RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[!-~](?:[\t -~]*[!-~])?|")
# Those that say how a response is to be read: with others of them, clients could read no response.
_OWN_HEADERS = frozenset(
    {
        "connection", "content-encoding", "content-length", "content-type", "keep-alive", "location", "set-cookie",
        "te", "trailer", "transfer-encoding", "upgrade", "www-authenticate",
    }
)  # fmt: skip
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}


class _WebConfigModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _is_bcrypt_hash(text: str) -> bool:
    if re.fullmatch(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}", text) is None:
        return False
    try:
        bcrypt.hashpw(b"", f"$2b$04${text[7:29]}".encode())  # refuses a salt with bits that mean nothing
    except ValueError:
        return False
    return True


class TlsServer(_WebConfigModel):
    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    client_auth_type: Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"] = "NoClientCert"
    min_version: Literal["TLS12", "TLS13"] = "TLS12"

    @model_validator(mode="after")
    def _check_client_certificates(self) -> "TlsServer":
        if self.client_ca_file is not None and self.client_auth_type == "NoClientCert":
            raise ValueError(
                "client_ca_file has no effect without client_auth_type: set that to RequireAndVerifyClientCert"
            )
        return self


class HttpServer(_WebConfigModel):
    headers: dict[str, str] = Field(default_factory=dict)

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if _HEADER_NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} is not the name of a header")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"{name} is set by Defib")
            if _HEADER_VALUE.fullmatch(value) is None:
                raise ValueError(f"the value of {name} must be one line of printable ASCII characters, not {value!r}")
        return headers


class WebConfig(_WebConfigModel):
    tls_server_config: TlsServer | None = None
    http_server_config: HttpServer = HttpServer()
    basic_auth_users: dict[str, str] = Field(default_factory=dict)
    roles: dict[str, UserRole] = Field(default_factory=dict)

    @field_validator("basic_auth_users")
    @classmethod
    def _check_hashes(cls, users: dict[str, str]) -> dict[str, str]:
        for name, hashed in users.items():
            if not _is_bcrypt_hash(hashed):
                raise ValueError(
                    f"the password of {name!r} is not a bcrypt hash; make one with htpasswd -nBC 10 {name}"
                )
        return users

    @model_validator(mode="after")
    def _check_roles(self) -> "WebConfig":
        unknown = sorted(self.roles.keys() - self.basic_auth_users.keys())
        if unknown:
            raise ValueError(f"roles: {', '.join(unknown)}: not in basic_auth_users")
        return self

    @property
    def users(self) -> WebUsers:
        roles = {name: Role(role) for name, role in self.roles.items()}
        return WebUsers(self.basic_auth_users, roles)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the server's TLS context, or None without TLS. Raises StartError."""
        tls = self.tls_server_config
        if tls is None:
            return None
        for path in filter(None, (tls.cert_file, tls.key_file, tls.client_ca_file)):
            _require_regular(Path(path))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[tls.min_version]
        restrict_key_exchange(context)
        try:
            # Without a password, OpenSSL would ask for that of an encrypted key at the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
            if tls.client_ca_file:
                context.load_verify_locations(tls.client_ca_file)
        except (OSError, ValueError) as error:
            raise StartError(f"web configuration: cannot load the certificate {tls.cert_file}: {error}") from error
        if tls.client_auth_type == "RequireAndVerifyClientCert":
            context.verify_mode = ssl.CERT_REQUIRED
        elif tls.client_auth_type == "VerifyClientCertIfGiven":
            context.verify_mode = ssl.CERT_OPTIONAL
        return context


def _require_regular(path: Path) -> None:
    """Raise StartError unless it is a file; to read a FIFO or a device could last for ever."""
    if not stat.S_ISREG(_read_status(path).st_mode):
        raise StartError(f"web configuration: {path} is not a regular file")


def _read_status(path: Path) -> os.stat_result:
    """Return the status of a file. Raises StartError."""
    try:
        return path.stat()
    except OSError as error:
        raise StartError(f"web configuration: cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a path with a NUL
        raise StartError(f"web configuration: cannot read {str(path)!r}: {error}") from error


def _format_error(error: ErrorDetails) -> str:
    message = describe(error, _MESSAGES)
    if error["type"] == "literal_error":
        message += f", not {error['input']!r}"
    return ": ".join(filter(None, [".".join(map(str, error["loc"])), message]))


def describe_exposure(path: Path) -> str:
    """Return who else can read or change the web configuration; empty if nobody can. Raises StartError."""
    mode = stat.S_IMODE(_read_status(path).st_mode)
    if mode & 0o022:
        return f"{path} has mode {mode:04o}: others can change it, and make themselves admin; run chmod go-w on it"
    if mode & 0o004:
        return f"{path} has mode {mode:04o}: every user can read its password hashes; run chmod o-r on it"
    return ""


def load(path: Path | None) -> WebConfig:
    """Read the file; relative paths in it are relative to it. Raises StartError."""
    if path is None:
        return WebConfig()
    _require_regular(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise StartError(f"web configuration: cannot read {path}: {error.strerror}") from error
    try:
        config = _parse(source)
    except yaml.YAMLError as error:
        line, cause = explain_yaml_error(source, error)
        raise StartError(f"{path}:{line}: invalid YAML: {cause}") from error
    except RecursionError as error:
        raise StartError(f"{path}: invalid YAML: too many levels") from error
    except ValidationError as error:
        problems = "; ".join(map(_format_error, error.errors()))
        raise StartError(f"{path}: {problems}") from None
    except INVALID_VALUES as error:
        raise StartError(f"{path}: invalid YAML: {error}") from error
    if config is None:
        raise StartError(f"{path} is empty; for no users and no TLS, write {{}}")
    if (tls := config.tls_server_config) is None:
        return config
    absolute = {name: path.parent / value for name, value in tls if isinstance(value, Path)}
    return config.model_copy(update={"tls_server_config": tls.model_copy(update=absolute)})


_State = list[tuple[int, int, int] | None]


def _protections(config: WebConfig) -> set[str]:
    """Return the names of what protects a server, and must not end because of a file that is written in part."""
    tls = config.tls_server_config
    present = {
        "tls_server_config": tls is not None,
        "client_auth_type: RequireAndVerifyClientCert": (
            tls is not None and tls.client_auth_type == "RequireAndVerifyClientCert"
        ),
        "users in basic_auth_users": bool(config.basic_auth_users),
    }
    return {name for name, is_present in present.items() if is_present}


def _parse(source: bytes) -> WebConfig | None:
    """Return the configuration, or None if there is none in the file, as while it is written."""
    value = load_unique(source)
    return None if value is None else WebConfig.model_validate(value)


class WebConfigFile:
    """The web configuration in force: that of the file, which is read again when it or a file that it names changes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.config = load(path)
        self._tls_files = _list_tls_files(self.config)
        self.tls = self.config.ssl_context()
        self._users = self._find_users(self.config)
        self._state = self._last_state = self._read_state()

    @property
    def users(self) -> WebUsers:
        return self._users

    async def run(self, record: Callable[..., None]) -> None:
        """Check the file until cancelled; `record` is called with whether a reload was `successful`."""
        while self._path is not None:
            await asyncio.sleep(CHECK_EVERY)
            await self.check(record)

    async def check(self, record: Callable[..., None]) -> None:
        """Read the file again after a change. An invalid file changes nothing.

        It must be the same at two checks, since many programs empty a file before they write it.
        """
        state, last = await asyncio.to_thread(self._read_state), self._last_state
        self._last_state = state
        if state == self._state or state != last:
            return
        try:
            is_complete = await asyncio.to_thread(self._load, state)
        except StartError as error:
            log.error("web_configuration_refused", error=str(error), effect="the previous one stays in force")  # noqa: TRY400
            self._state = state
            record(successful=False)
            return
        if is_complete:
            self._state = state
            log.info("web_configuration_reloaded", users=len(self.config.basic_auth_users))
            record(successful=True)

    def _find_users(self, config: WebConfig) -> WebUsers:
        exposed = describe_exposure(self._path) if self._path is not None else ""
        if exposed:
            log.warning("web_configuration_exposed", problem=exposed)
        return replace(config.users, exposed=exposed)

    def _load(self, state: _State) -> bool:
        """Apply the file; False if the files changed after `state`. Raises StartError."""
        config = load(self._path)
        if self._read_state() != state:
            return False
        # Also those of a configuration that is refused: a certificate may arrive after the file that names it.
        self._tls_files = _list_tls_files(config)
        self._refuse_loss(config)
        self.tls, self.config, self._users = config.ssl_context(), config, self._find_users(config)
        return True

    def _refuse_loss(self, config: WebConfig) -> None:
        """Raise StartError if a configuration protects less: it is more likely a mistake than meant."""
        lost = sorted(_protections(self.config) - _protections(config))
        if lost:
            raise StartError(f"{self._path} has no {lost[-1]} any more; if that is meant, restart the program")

    def _read_state(self) -> _State:
        """Return what identifies the present content of the files."""
        return [_identify(path) for path in (self._path, *self._tls_files) if path is not None]


def _list_tls_files(config: WebConfig) -> list[Path | None]:
    tls = config.tls_server_config
    return [] if tls is None else [tls.cert_file, tls.key_file, tls.client_ca_file]


def _identify(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # there is none, or its path has a NUL
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
