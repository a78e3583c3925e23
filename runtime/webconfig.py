"""The `--web.config.file`, as Prometheus exporters have it: TLS, headers and users, and the users' roles.

Format: https://prometheus.io/docs/prometheus/latest/configuration/https/
"""

import asyncio
import re
import ssl
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import bcrypt
import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from runtime.access.control import WebUsers
from runtime.access.roles import Role, UserRole
from runtime.errors import StartError
from runtime.tls import restrict_key_exchange
from runtime.yaml_errors import explain_yaml_error

CHECK_EVERY = 1.0  # seconds
log = structlog.get_logger()
_MESSAGES = {
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "model_type": "must be a map",
    "dict_type": "must be a map",
    "string_type": "must be text, in quotes",
}
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
            context.load_cert_chain(tls.cert_file, tls.key_file)
            if tls.client_ca_file:
                context.load_verify_locations(tls.client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"web configuration: cannot load the certificate {tls.cert_file}: {error}") from error
        if tls.client_auth_type == "RequireAndVerifyClientCert":
            context.verify_mode = ssl.CERT_REQUIRED
        elif tls.client_auth_type == "VerifyClientCertIfGiven":
            context.verify_mode = ssl.CERT_OPTIONAL
        return context


def _require_regular(path: Path) -> None:
    """Raise StartError if reading the file could last for ever, as that of a FIFO or a device."""
    if path.exists() and not path.is_file():
        raise StartError(f"web configuration: {path} is not a regular file")


def _format_error(error: ErrorDetails) -> str:
    message = _MESSAGES.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] == "literal_error":
        message = f"must be {error['ctx']['expected']}, not {error['input']!r}"
    return ": ".join(filter(None, [".".join(map(str, error["loc"])), message]))


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys: the later one would silently replace the roles of all users, for example."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def describe_exposure(path: Path) -> str:
    """Return who else can read or change the web configuration; empty if nobody can."""
    mode = stat.S_IMODE(path.stat().st_mode)
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
        config = WebConfig.model_validate(yaml.load(source, _Loader) or {})  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        line, cause = explain_yaml_error(source, error)
        raise StartError(f"{path}:{line}: invalid YAML: {cause}") from error
    except RecursionError as error:
        raise StartError(f"{path}: invalid YAML: too many levels") from error
    except ValidationError as error:
        problems = "; ".join(map(_format_error, error.errors()))
        raise StartError(f"{path}: {problems}") from None
    except ValueError as error:  # of PyYAML, such as for the date 2026-13-45
        raise StartError(f"{path}: invalid YAML: {error}") from error
    if (tls := config.tls_server_config) is None:
        return config
    absolute = {name: path.parent / value for name, value in tls if isinstance(value, Path)}
    return config.model_copy(update={"tls_server_config": tls.model_copy(update=absolute)})


class WebConfigFile:
    """The web configuration in force: that of the file, which is read again when it or a file that it names changes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.config = load(path)
        self._tls_files = _list_tls_files(self.config)
        self.tls = self.config.ssl_context()
        self._users = self._find_users(self.config)
        self._state = self._read_state()

    @property
    def users(self) -> WebUsers:
        return self._users

    async def run(self) -> None:
        """Read the file again after each change, until cancelled. An invalid file changes nothing."""
        while self._path is not None:
            await asyncio.sleep(CHECK_EVERY)
            state = await asyncio.to_thread(self._read_state)
            if state == self._state:
                continue
            self._state = state
            try:
                await asyncio.to_thread(self._load)
            except StartError as error:
                log.error("web_configuration_refused", error=str(error), effect="the previous one stays in force")  # noqa: TRY400
                continue
            log.info("web_configuration_reloaded", users=len(self.config.basic_auth_users))

    def _find_users(self, config: WebConfig) -> WebUsers:
        exposed = describe_exposure(self._path) if self._path is not None else ""
        if exposed:
            log.warning("web_configuration_exposed", problem=exposed)
        return replace(config.users, exposed=exposed)

    def _load(self) -> None:
        config = load(self._path)
        # Also those of a configuration that is refused: a certificate may arrive after the file that names it.
        self._tls_files = _list_tls_files(config)
        self.tls, self.config, self._users = config.ssl_context(), config, self._find_users(config)

    def _read_state(self) -> list[tuple[int, int, int] | None]:
        """Return what identifies the present content of the files."""
        return [_identify(path) for path in (self._path, *self._tls_files) if path is not None]


def _list_tls_files(config: WebConfig) -> list[Path | None]:
    tls = config.tls_server_config
    return [] if tls is None else [tls.cert_file, tls.key_file, tls.client_ca_file]


def _identify(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
