"""blackbox_exporter's configuration file (https://github.com/prometheus/blackbox_exporter/blob/master/CONFIGURATION.md).

What the exporter cannot do as that program does is refused, so that no module checks less than it says.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from runtime.errors import DefibError
from runtime.validation_messages import describe_first
from runtime.yaml_loading import DUPLICATE, INVALID_VALUES, load_unique

FILE_LIMIT = 4 * 2**20  # bytes
IpProtocol = Literal["", "ip4", "ip6"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, written: object) -> object:
        """An empty section or option is as one that is not written."""
        if not isinstance(written, dict):
            return written
        return {key: value for key, value in written.items() if value is not None}


def _as_text(value: object) -> object:
    """Return a whole number, true or false as a text: all others are read as texts."""
    return str(value).lower() if isinstance(value, int) else value


Text = Annotated[str, BeforeValidator(_as_text)]
Secret = Annotated[SecretStr, BeforeValidator(_as_text)]


class TlsConfig(_Model):
    insecure_skip_verify: bool = False
    ca_file: Text = ""
    cert_file: Text = ""
    key_file: Text = ""
    server_name: Text = ""
    min_version: Literal["", "TLS10", "TLS11", "TLS12", "TLS13"] = ""
    max_version: Literal["", "TLS10", "TLS11", "TLS12", "TLS13"] = ""


class BasicAuth(_Model):
    username: Text = ""
    password: Secret = SecretStr("")
    password_file: Text = ""


class Authorization(_Model):
    type: Text = "Bearer"
    credentials: Secret = SecretStr("")
    credentials_file: Text = ""


class OAuth2(_Model):
    client_id: Text
    client_secret: Secret = SecretStr("")
    client_secret_file: Text = ""
    token_url: Text
    scopes: list[Text] = []
    endpoint_params: dict[str, Text] = Field(default_factory=dict)


class HeaderMatch(_Model):
    header: Text
    regexp: Text
    allow_missing: bool = False


class HttpModule(_Model):
    valid_status_codes: list[int] = []
    valid_http_versions: list[Text] = []
    method: Text = "GET"
    headers: dict[str, Secret] = Field(default_factory=dict)
    body: Text = ""
    body_file: Text = ""
    body_size_limit: Text = ""
    compression: Text = ""
    follow_redirects: bool = True
    no_follow_redirects: bool = False
    fail_if_ssl: bool = False
    fail_if_not_ssl: bool = False
    fail_if_body_matches_regexp: list[Text] = []
    fail_if_body_not_matches_regexp: list[Text] = []
    fail_if_header_matches: list[HeaderMatch] = []
    fail_if_header_not_matches: list[HeaderMatch] = []
    basic_auth: BasicAuth | None = None
    authorization: Authorization | None = None
    bearer_token: Secret = SecretStr("")
    bearer_token_file: Text = ""
    oauth2: OAuth2 | None = None
    proxy_url: Text = ""
    proxy_connect_header: dict[str, list[Secret]] = Field(default_factory=dict)
    skip_resolve_phase_with_proxy: bool = False
    enable_http2: bool = True
    tls_config: TlsConfig = TlsConfig()
    preferred_ip_protocol: IpProtocol = ""
    ip_protocol_fallback: bool = True
    source_ip_address: Text = ""


class QueryResponse(_Model):
    expect: Text = ""
    send: Text = ""
    starttls: bool = False


class TcpModule(_Model):
    query_response: list[QueryResponse] = []
    tls: bool = False
    tls_config: TlsConfig = TlsConfig()
    preferred_ip_protocol: IpProtocol = ""
    ip_protocol_fallback: bool = True
    source_ip_address: Text = ""


class RecordChecks(_Model):
    fail_if_matches_regexp: list[Text] = []
    fail_if_all_match_regexp: list[Text] = []
    fail_if_not_matches_regexp: list[Text] = []
    fail_if_none_matches_regexp: list[Text] = []


class DnsModule(_Model):
    query_name: Text
    query_type: Text = "ANY"
    query_class: Text = "IN"
    recursion_desired: bool = True
    transport_protocol: Literal["udp", "tcp"] = "udp"
    dns_over_tls: bool = False
    tls_config: TlsConfig = TlsConfig()
    valid_rcodes: list[Text] = []
    validate_answer_rrs: RecordChecks = RecordChecks()
    validate_authority_rrs: RecordChecks = RecordChecks()
    validate_additional_rrs: RecordChecks = RecordChecks()
    preferred_ip_protocol: IpProtocol = ""
    ip_protocol_fallback: bool = True
    source_ip_address: Text = ""


class IcmpModule(_Model):
    payload_size: int = 0
    dont_fragment: bool = False
    ttl: int = 0
    preferred_ip_protocol: IpProtocol = ""
    ip_protocol_fallback: bool = True
    source_ip_address: Text = ""


class GrpcModule(_Model):
    service: Text = ""
    tls: bool = False
    tls_config: TlsConfig = TlsConfig()
    preferred_ip_protocol: IpProtocol = ""
    ip_protocol_fallback: bool = True


class Module(_Model):
    """A way to probe targets; the section of its `prober` has the options. `timeout` is a duration of Prometheus'."""

    prober: Literal["http", "tcp", "dns", "icmp", "grpc"]
    timeout: Text = ""
    http: HttpModule = HttpModule()
    tcp: TcpModule = TcpModule()
    dns: DnsModule | None = None
    icmp: IcmpModule = IcmpModule()
    grpc: GrpcModule = GrpcModule()


class _File(_Model):
    modules: dict[str, Module]


def read_file(path: Path) -> dict[str, Module]:
    """Read the modules of a file, by name. Raises DefibError."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
        if len(content) > FILE_LIMIT:
            raise DefibError(f"{path}: larger than {FILE_LIMIT} bytes")
        written = load_unique(content, keeps_texts=True)
        return _File.model_validate(written if written is not None else {}).modules
    except OSError as error:
        raise DefibError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise DefibError(f"{path}: {describe_first(error, 'the file')}") from None  # it shows values
    except (yaml.YAMLError, RecursionError, *INVALID_VALUES) as error:
        raise DefibError(f"{path}: {_describe_yaml(error)}") from None


def _describe_yaml(error: Exception) -> str:
    """Return what is wrong and where, without the excerpt that the error shows: it may have a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
    where = f" in line {mark.line + 1}" if mark is not None else ""
    what = DUPLICATE if problem.startswith(DUPLICATE) else f"not valid YAML ({problem})"
    return f"{what}{where}"
