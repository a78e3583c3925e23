"""Translates a module of blackbox_exporter and a target into the options of a probe."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import re2

from exporter.modules.blackbox_file import (
    Authorization,
    DnsModule,
    GrpcModule,
    HeaderMatch,
    HttpModule,
    IcmpModule,
    Module,
    QueryResponse,
    RecordChecks,
    TcpModule,
    TlsConfig,
)
from fleet.inventory.endpoints import split_address
from fleet.inventory.units import compile_pattern

MAX_GROUP = 9
SECRET_LIMIT = 64 * 1024  # bytes of a file with a password
_VERSIONS = {"TLS10": "1.0", "TLS11": "1.1", "TLS12": "1.2", "TLS13": "1.3"}
_HTTP_VERSIONS = {"HTTP/1.0": "1.0", "HTTP/1.1": "1.1", "HTTP/2.0": "2"}
_REFERENCE = re.compile(r"\$(?:\$|\{(\w+)\}|(\w+))")  # as Go's Regexp.Expand has them
_SIZE = re.compile(r"(?:(\d{1,15}(?:\.\d{1,9})?) ?([KMGTkmgt]?)(?:i?B)?)?")
_ANY_GROUP = re.compile(r"\{\d\}")
_OUR_GROUP = re.compile(r"(?<!\$)\{\d\}")


def translate(module: Module, target: str, hostname: str = "") -> dict[str, Any]:
    """Return the options of the probe of the kind `module.prober`. Raises ValueError if there are none.

    `hostname` is sent as the name of the host in HTTP and TLS, unless the module has others.
    """
    if module.prober == "http":
        return _translate_http(module.http, target, hostname)
    if module.prober == "tcp":
        return _translate_tcp(module.tcp, target, hostname)
    if module.prober == "dns":
        if module.dns is None:
            raise ValueError("dns: query_name is missing")
        return _translate_dns(module.dns, target)
    if module.prober == "icmp":
        return _translate_icmp(module.icmp, target)
    return _translate_grpc(module.grpc, target)


def list_files(module: Module) -> list[str]:
    """Return the files whose content becomes a part of the options; those of TLS and bearer tokens does not."""
    http = module.http
    files = [http.body_file]
    if http.basic_auth is not None:
        files.append(http.basic_auth.password_file)
    if http.authorization is not None:
        files.append(http.authorization.credentials_file)
    if http.oauth2 is not None:
        files.append(http.oauth2.client_secret_file)
    return [each for each in files if each]


def find_host(prober: str, options: Any) -> str:
    """Return the host that a probe of the kind `prober` connects to."""
    if prober == "http":
        return str(options.request.host)
    if prober == "dns":
        return str(options.host_and_port[0])
    return str(options.address) if prober == "icmp" else split_address(options.address)[0]


def _translate_http(module: HttpModule, target: str, hostname: str) -> dict[str, Any]:
    tls = _translate_tls(module.tls_config)
    headers = {name: value.get_secret_value() for name, value in module.headers.items()}
    if hostname and not any(name.lower() == "host" for name in headers):
        headers["Host"] = hostname
    if module.authorization is not None and module.authorization.type.lower() != "bearer":
        headers["Authorization"] = _format_authorization(module.authorization)
    if module.compression and not any(name.lower() == "accept-encoding" for name in headers):
        headers["Accept-Encoding"] = module.compression
    url, user_info = _split_user_info(target if target.startswith(("http://", "https://")) else f"http://{target}")
    options: dict[str, Any] = {
        "url": url.replace(" ", "%20"),
        "method": module.method or "GET",
        "headers": headers,
        "follow_redirects": module.follow_redirects and not module.no_follow_redirects,
        "tls": tls,
        "version": "auto" if module.enable_http2 else "1.1",
        "expect": _expect_of_http(module),
        **(user_info or _auth_of(module)),
        **_dial(module),
    }
    if module.body and module.body_file:
        raise ValueError("http: body and body_file exclude each other")
    if module.body or module.body_file:
        options["body"] = module.body or _read_text(module.body_file)
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = ""  # none
    if limit := _parse_size(module.body_size_limit):
        options["max_body"] = f"{limit}B"
    if module.proxy_url:
        options["proxy"] = _translate_proxy(module)
    return options


def _split_user_info(url: str) -> tuple[str, dict[str, Any]]:
    """Return a URL without user and password, and these as options."""
    parts = urlsplit(url)
    user_info, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    user, _, password = user_info.partition(":")
    basic = {"username": unquote(user), "password": unquote(password)}
    return url.replace(parts.netloc, host, 1), {"auth": {"basic": basic}}


def _parse_size(text: str) -> int:
    """Return the bytes of a size such as `1.5MB`, whose units are powers of 1024; 0 if there is none."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"http: body_size_limit: {text!r} is not a size")
    return int(float(found[1] or 0) * 1024 ** " KMGT".index((found[2] or " ").upper()))


def _translate_proxy(module: HttpModule) -> dict[str, Any]:
    url, user_info = _split_user_info(module.proxy_url)
    sent = {name: value.get_secret_value() for name, values in module.proxy_connect_header.items() for value in values}
    return {"url": url, "headers": sent, **user_info}


def _expect_of_http(module: HttpModule) -> dict[str, Any]:
    expect: dict[str, Any] = {
        "body_lacks": module.fail_if_body_matches_regexp,
        "body_matches": module.fail_if_body_not_matches_regexp,
        "headers": _expect_of_headers(module.fail_if_header_matches, module.fail_if_header_not_matches),
    }
    if module.valid_status_codes:
        expect["status"] = module.valid_status_codes
    if module.valid_http_versions:
        versions = [_HTTP_VERSIONS[each] for each in module.valid_http_versions if each in _HTTP_VERSIONS]
        if not versions:
            raise ValueError("http: valid_http_versions: only HTTP/1.0, HTTP/1.1 and HTTP/2.0 are used")
        expect["http_version"] = versions
    if module.fail_if_ssl and module.fail_if_not_ssl:
        raise ValueError("http: fail_if_ssl and fail_if_not_ssl exclude each other")
    if module.fail_if_ssl or module.fail_if_not_ssl:
        expect["tls"] = module.fail_if_not_ssl
    return expect


def _expect_of_headers(lacking: list[HeaderMatch], matching: list[HeaderMatch]) -> dict[str, Any]:
    """Return what is expected of each header."""
    expected: dict[str, dict[str, Any]] = {}
    for key, checks in (("lacks", lacking), ("matches", matching)):
        for check in checks:
            found = expected.setdefault(check.header.lower(), {"optional": True, "matches": [], "lacks": []})
            found["optional"] = found["optional"] and check.allow_missing  # one that may not be missing fails
            found[key].append(check.regexp)
    return expected


def _auth_of(module: HttpModule) -> dict[str, Any]:
    basic, authorization, oauth2 = module.basic_auth, module.authorization, module.oauth2
    if basic is not None:
        password = basic.password.get_secret_value() or (_read_text(basic.password_file) if basic.password_file else "")
        return {"auth": {"basic": {"username": basic.username, "password": password}}}
    if oauth2 is not None:
        secret = oauth2.client_secret.get_secret_value() or _read_text(oauth2.client_secret_file)
        written = oauth2.model_dump(include={"client_id", "token_url", "scopes", "endpoint_params"})
        return {"auth": {"oauth2": {**written, "client_secret": secret}}}
    token, file = module.bearer_token.get_secret_value(), module.bearer_token_file
    if authorization is not None and authorization.type.lower() == "bearer":
        token, file = authorization.credentials.get_secret_value(), authorization.credentials_file
    if token:
        return {"auth": {"bearer": token}}
    return {"auth": {"bearer_file": _existing(file)}} if file else {}


def _format_authorization(authorization: Authorization) -> str:
    credentials = authorization.credentials.get_secret_value()
    return f"{authorization.type} {credentials or _read_text(authorization.credentials_file)}"


def _translate_tcp(module: TcpModule, target: str, hostname: str) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for entry in module.query_response:
        if entry.expect:
            steps.append({"expect": entry.expect})
        if entry.send:
            steps.append({"send": f"{_translate_groups(entry)}\n"})
        if entry.starttls:
            steps.append({"starttls": True})
    tls = _translate_tls(module.tls_config)
    if hostname:
        tls.setdefault("server_name", hostname)
    uses_tls = module.tls or any(entry.starttls for entry in module.query_response)
    return {"address": target, "dialogue": steps, **({"tls": tls} if uses_tls else {}), **_dial(module)}


def _translate_groups(entry: QueryResponse) -> str:
    """Return what an entry sends, with references to groups of its own match as those of a dialogue."""
    text = entry.send
    if (_OUR_GROUP if entry.expect else _ANY_GROUP).search(text):
        raise ValueError(f"tcp: send: {text!r} has a number in braces, which stands for a group here")
    if not entry.expect:
        return text
    try:
        pattern = compile_pattern(entry.expect)
    except re2.error:  # reported with its place, when the options are checked
        return text

    def translate(reference: re.Match[str]) -> str:
        name = reference[1] or reference[2]
        if name is None:
            return "$"
        number = int(name) if name.isdecimal() else pattern.groupindex.get(name, 0)
        if (number == 0 and name.isdecimal()) or number > MAX_GROUP:
            raise ValueError(f"tcp: send: {reference[0]} cannot be sent, only the groups 1 to {MAX_GROUP}")
        return f"{{{number}}}" if 0 < number <= pattern.groups else ""  # nothing, as there

    return _REFERENCE.sub(translate, text)


def _translate_dns(module: DnsModule, target: str) -> dict[str, Any]:
    transport = "tls" if module.dns_over_tls else module.transport_protocol
    sections = {
        "answer": module.validate_answer_rrs,
        "authority": module.validate_authority_rrs,
        "additional": module.validate_additional_rrs,
    }
    expect: dict[str, Any] = {name: _translate_records(checks) for name, checks in sections.items()}
    if module.valid_rcodes:
        expect["rcode"] = module.valid_rcodes
    return {
        "server": target,
        "name": module.query_name,
        "type": module.query_type,
        "class": module.query_class,
        "recursion": module.recursion_desired,
        "transport": transport,
        "expect": expect,
        **({"tls": _translate_tls(module.tls_config)} if transport == "tls" else {}),
        **_dial(module),
    }


def _translate_records(checks: RecordChecks) -> dict[str, Any]:
    return {
        "lacks": _with_blanks(checks.fail_if_matches_regexp),
        "not_all_match": _with_blanks(checks.fail_if_all_match_regexp),
        "all_match": _with_blanks(checks.fail_if_not_matches_regexp),
        "matches": _with_blanks(checks.fail_if_none_matches_regexp),
    }


def _with_blanks(patterns: Iterable[str]) -> list[str]:
    """Return patterns of records for ours, whose fields are separated by single blanks instead of tabs."""
    return [re.sub(r"(?:\\t|\t)(?:[+*])?", " ", pattern) for pattern in patterns]


def _translate_icmp(module: IcmpModule, target: str) -> dict[str, Any]:
    options = {"address": target, "dont_fragment": module.dont_fragment, **_dial(module)}
    if module.payload_size:
        options["size"] = module.payload_size
    if module.ttl:
        options["ttl"] = module.ttl
    return options


def _translate_grpc(module: GrpcModule, target: str) -> dict[str, Any]:
    tls = {"tls": _translate_tls(module.tls_config)} if module.tls else {}
    return {"address": target, "service": module.service, **tls, **_dial(module)}


def _translate_tls(config: TlsConfig) -> dict[str, Any]:
    written: dict[str, Any] = {"verify": not config.insecure_skip_verify}
    for key in ("ca_file", "cert_file", "key_file"):
        if getattr(config, key):
            written[key] = _existing(getattr(config, key))
    if config.server_name:
        written["server_name"] = config.server_name
    for key in ("min_version", "max_version"):
        if getattr(config, key):
            written[key] = _VERSIONS[getattr(config, key)]
    return written


def _dial(module: HttpModule | TcpModule | DnsModule | IcmpModule | GrpcModule) -> dict[str, Any]:
    preferred = 4 if module.preferred_ip_protocol == "ip4" else 6  # which is their default
    source = getattr(module, "source_ip_address", "")
    return {
        "ip": [preferred, 10 - preferred] if module.ip_protocol_fallback else [preferred],
        **({"source": source} if source else {}),
    }


def _existing(path: str) -> Path:
    """Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    return Path(path)


def _read_text(path: str) -> str:
    """Return the text of a file without white space at its ends. Raises ValueError."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(SECRET_LIMIT + 1)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if len(text) > SECRET_LIMIT:
        raise ValueError(f"{path} is longer than {SECRET_LIMIT} characters")
    return text.strip()
