"""Building blocks of the configuration: the base models, paths, URLs, addresses, credentials and TLS settings."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fleet.inventory.yaml_files import TextWithBase
from runtime.addresses import NAME_LIMIT, has_long_host


class ReferencesAreSecret:
    """Annotation of a field that often contains credentials: the values of references in it are secrets."""


REFERENCES_ARE_SECRET = ReferencesAreSecret()


_FIELD_SETS: dict[frozenset[str], set[str]] = {}


class ConfigModel(BaseModel):
    """A part of the configuration: immutable, without unknown keys.

    Values with references that this program does not resolve are not validated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _skip_unresolved(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, TextWithBase) and value.pending:
            return value
        return handler(value)

    @model_validator(mode="after")
    def _share_names_of_fields(self) -> Self:
        """Share the set of the fields that were set: the parts of 10,000 services have some hundred different ones."""
        own = self.__pydantic_fields_set__
        object.__setattr__(self, "__pydantic_fields_set__", _FIELD_SETS.setdefault(frozenset(own), own))
        return self

    def _private(self, name: str) -> Any:
        """Return a private attribute; pydantic's own access takes 20 times as long."""
        return (self.__pydantic_private__ or {})[name]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return the same part: it is immutable. Pydantic copies each default that it uses."""
        return self


class ChoiceModel(ConfigModel):
    """A part of the configuration with exactly one of the optional fields in `choices`."""

    choices: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _exactly_one(self) -> "ChoiceModel":
        chosen = [name for name in self.choices if getattr(self, name) is not None]
        if len(chosen) != 1:
            found = f", not {' and '.join(chosen)}" if chosen else ""
            raise ValueError(f"must have exactly one of {', '.join(self.choices)}{found}")
        return self

    @property
    def kind(self) -> str:
        fields = reversed(self.__dict__.items())  # the choices are the last ones
        return next(name for name, value in fields if value is not None and name in self.choices)

    @property
    def options(self) -> Any:
        return getattr(self, self.kind)


def _path(value: object) -> object:
    if not isinstance(value, TextWithBase):
        return value
    if "\0" in value:
        raise ValueError(f"{str(value)!r} must not contain NUL")
    try:
        return value.base / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(value)!r} cannot be resolved: {error}") from error


def _existing_file(value: object) -> object:
    return _check_path(value, Path.is_file, "file")


def _existing_directory(value: object) -> object:
    return _check_path(value, Path.is_dir, "directory")


def _check_path(value: object, exists: Callable[[Path], bool], what: str) -> object:
    path = _path(value)
    if not isinstance(value, TextWithBase) or not value.checked or not isinstance(path, Path):
        return path
    try:
        found = exists(path)
    except OSError as error:
        raise ValueError(f"the {what} {path} cannot be read: {error.strerror}") from error
    if not found:
        raise ValueError(f"there is no {what} {path}")
    return path


RelativePath = Annotated[Path, BeforeValidator(_path), WithJsonSchema({"type": "string"})]
ExistingDirectory = Annotated[Path, BeforeValidator(_existing_directory), WithJsonSchema({"type": "string"})]
ExistingFile = Annotated[Path, BeforeValidator(_existing_file), WithJsonSchema({"type": "string"})]


def check_url(url: str) -> str:
    if has_long_host(url):
        raise ValueError(f"the name of the host is longer than {NAME_LIMIT} characters")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if good and "@" in urlsplit(url).netloc:
        raise ValueError("must not contain credentials; use `auth:`")
    if good and "{" in urlsplit(url).netloc:
        placeholder = re.sub(r"[^{]*(\{[^}]*\}?).*", r"\1", urlsplit(url).netloc)
        raise ValueError(f"unknown placeholder {placeholder} (known: {{host.address}}, {{host.name}}, {{service}})")
    if not good or any(character <= " " or character == "\x7f" for character in url):
        raise ValueError("is not a URL; write http://host:port/path")
    return url


def _check_secret_url(url: SecretStr) -> SecretStr:
    check_url(url.get_secret_value())
    return url


def check_token(token: SecretStr) -> SecretStr:
    value = token.get_secret_value()
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("must be one line of printable ASCII characters without spaces")
    return token


Token = Annotated[SecretStr, Field(min_length=1)]
OwnToken = Annotated[Token, AfterValidator(check_token)]  # one that Defib's servers accept
Url = Annotated[str, AfterValidator(check_url)]
SecretUrl = Annotated[SecretStr, AfterValidator(_check_secret_url)]


MAX_PORT = 65535


def check_host_and_port(address: str) -> str:
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]{}]+):(\d+)", address)
    if found is None or not 0 < int(found[1]) <= MAX_PORT:
        raise ValueError(f"{address!r} is not an address; write host:port or [v6]:port")
    if len(address) > NAME_LIMIT + len(":65535"):
        raise ValueError(f"the name of the host is longer than {NAME_LIMIT} characters")
    return address


Address = Annotated[str, AfterValidator(check_host_and_port)]


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class BasicAuth(ConfigModel):
    username: Annotated[str, Field(pattern=r"^[^:]*$")]
    password: SecretStr

    @property
    def encoded(self) -> str:
        """The credentials as in the header (RFC 7617, UTF-8)."""
        return base64.b64encode(f"{self.username}:{self.password.get_secret_value()}".encode()).decode()


class HttpAuth(ChoiceModel):
    choices: ClassVar[tuple[str, ...]] = ("basic", "bearer")
    basic: BasicAuth | None = None
    bearer: Token | None = None


def _server_name(name: str) -> str:
    try:
        name.encode("idna")
    except UnicodeError:
        raise ValueError(f"{name!r} is not a valid host name") from None
    return name


ServerName = Annotated[str, Field(min_length=1, max_length=253), AfterValidator(_server_name)]


class TlsSettings(ConfigModel):
    verify: bool = True
    ca_file: ExistingFile | None = None
    cert_file: ExistingFile | None = None
    key_file: ExistingFile | None = None
    server_name: ServerName | None = None

    @model_validator(mode="after")
    def _check_key(self) -> "TlsSettings":
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs cert_file")
        return self


class Endpoint(ConfigModel):
    """An HTTP server that Defib calls: `http://host:port`, or `{url: …, auth: …, tls: …}`."""

    url: Url
    auth: HttpAuth | None = None
    tls: TlsSettings = TlsSettings()

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a schema that allows the short form."""
        part = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [{"type": "string"}, part]} if "properties" in part else part

    @property
    def base(self) -> str:
        return self.url.rstrip("/")
