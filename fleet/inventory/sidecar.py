"""The gateway's settings from the variables `SIDECAR_…`, which installations of an earlier proxy have set."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from fleet.inventory.endpoints import MAX_PORT, check_token, check_url
from fleet.inventory.gateway import GatewaySettings, QueueSettings, UpstreamSettings, format_rate
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.units import format_duration
from runtime.errors import StartError

NVIDIA = "https://integrate.api.nvidia.com/v1"
_PREFIX = "SIDECAR_"
API_KEY = f"{_PREFIX}API_KEY"
MAX_TIMEOUT = 300.0  # seconds
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _parse_count(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}, not {text[:100]!r}")
        return int(text)

    return parse


def _parse_number(least: float, most: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:  # nan is not
            raise ValueError(f"must be a number of {what} from {least:g} to {most:.10g}, not {text[:100]!r}")
        return number

    return parse


def _parse_choice(choices: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text.lower() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {text[:100]!r}")
        return choices[text.lower()]

    return parse


def _parse_secret(text: str) -> SecretStr:
    return check_token(SecretStr(text))


def _parse_upstream(text: str) -> str:
    """Return the URL of an API; one without a path has the API's paths, which begin with `/v1`."""
    url = check_url(text).rstrip("/")
    return url if urlsplit(url).path else f"{url}/v1"


def _parse_host(text: str) -> str:
    if not text.isascii() or not text.isprintable() or any(each in " /@?#" for each in text):
        raise ValueError(f"must be an address to listen on, not {text[:100]!r}")
    return f"[{text}]" if ":" in text and not text.startswith("[") else text


# By variable: the value without it, and the parser of its text, which raises ValueError.
_VARIABLES: Mapping[str, tuple[Any, Callable[[str], Any]]] = {
    "SIDECAR_HOST": ("127.0.0.1", _parse_host),
    "SIDECAR_PORT": (9190, _parse_count(1, MAX_PORT)),
    "SIDECAR_METRICS_PORT": (9191, _parse_count(1, MAX_PORT)),
    "SIDECAR_UPSTREAM": (NVIDIA, _parse_upstream),
    API_KEY: (None, _parse_secret),
    "SIDECAR_RATE_RPM": (40.0, _parse_number(1, 1e9, "requests a minute")),
    "SIDECAR_BUCKET_CAPACITY": (40, _parse_count(1, 10**9)),
    "SIDECAR_TIMEOUT": (60.0, _parse_number(0.001, MAX_TIMEOUT, "seconds")),
    "SIDECAR_QUEUE_MAX": (500, _parse_count(0, 100_000)),
    "SIDECAR_LOW_TIMEOUT": (2.0, _parse_number(0.001, 86_400, "seconds")),
    "SIDECAR_FALLBACK_PASSTHROUGH": (False, _parse_choice(_FLAGS)),
    "SIDECAR_LOG_LEVEL": (logging.INFO, _parse_choice(_LEVELS)),
    "SIDECAR_ADMIN_TOKEN": (None, _parse_secret),
}


@dataclass(frozen=True)
class SidecarSettings:
    """What the variables say, also where they are not set."""

    gateway: GatewaySettings
    log_level: int
    secrets: frozenset[str] = field(repr=False)


def list_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that are set; an empty one is not."""
    return [name for name in _VARIABLES if environ.get(name, "").strip()]


def list_unknown(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that are set and have no meaning, such as misspelled ones."""
    return sorted(name for name in environ if name.startswith(_PREFIX) and name not in _VARIABLES)


def read_variables(environ: Mapping[str, str]) -> SidecarSettings:
    """Return the settings of the variables. Raises StartError with every wrong value."""
    values: dict[str, Any] = {}
    problems = []
    for name, (default, parse) in _VARIABLES.items():
        text = environ.get(name, "").strip()
        try:
            values[name] = parse(text) if text else default
        except ValueError as error:
            problems.append(f"{name}: {error}")
    variables = list_variables(environ)
    if API_KEY not in variables:
        others = ", ".join(variables)
        problems.append(f"{API_KEY} is not set, and gateway.upstreams is not configured, but {others} is set")
    if problems:
        raise StartError("\n".join(problems))
    secrets = (values[API_KEY], values["SIDECAR_ADMIN_TOKEN"])
    return SidecarSettings(
        _create_settings(values),
        values["SIDECAR_LOG_LEVEL"],
        frozenset(each.get_secret_value() for each in secrets if each is not None),
    )


def _create_settings(values: Mapping[str, Any]) -> GatewaySettings:
    host, port, metrics_port = (values[f"SIDECAR_{each}"] for each in ("HOST", "PORT", "METRICS_PORT"))
    url = values["SIDECAR_UPSTREAM"]
    name = "nvidia" if url == NVIDIA else "upstream"
    upstream = UpstreamSettings(
        url=url,
        api_key=values[API_KEY],
        rate=format_rate(values["SIDECAR_RATE_RPM"]),
        burst=values["SIDECAR_BUCKET_CAPACITY"],
        timeout=format_duration(values["SIDECAR_TIMEOUT"]),
    )
    queue = QueueSettings(
        size=values["SIDECAR_QUEUE_MAX"],
        when_full="passthrough" if values["SIDECAR_FALLBACK_PASSTHROUGH"] else "reject",
        low_timeout=format_duration(values["SIDECAR_LOW_TIMEOUT"]),
    )
    return GatewaySettings(
        listen=f"{host}:{port}",
        metrics_listen=f"{host}:{metrics_port}" if metrics_port != port else None,
        token=values["SIDECAR_ADMIN_TOKEN"],
        upstreams={name: upstream},
        default=name,
        queue=queue,
    )


def load_with_variables(load: Callable[[], LoadedInventory], environ: Mapping[str, str]) -> LoadedInventory:
    """Load a configuration, with the variables in force if it has no upstreams. Raises DefibError.

    What else the configuration has of the gateway, such as clients, stays in force.
    """
    loaded = load()
    written = loaded.inventory.gateway
    if written.upstreams or not list_variables(environ):
        return loaded
    settings = read_variables(environ)
    kept = {name: getattr(written, name) for name in ("url", "retreat", "clients", "max_body")}
    kept["state_file"] = written.state_file or _find_state_file(environ)
    if settings.gateway.token is None:
        kept["token"] = written.token
    gateway = settings.gateway.model_copy(update=kept)
    others = [client.token for client in gateway.clients.values()] + [loaded.inventory.access.metrics_token]
    if gateway.token is not None and gateway.token in others:
        raise StartError("SIDECAR_ADMIN_TOKEN: must differ from the tokens of clients, and from access.metrics_token")
    inventory = loaded.inventory.model_copy(update={"gateway": gateway})
    return replace(loaded, inventory=inventory, secrets=loaded.secrets | settings.secrets)


def _find_state_file(environ: Mapping[str, str]) -> Path | None:
    """Return a file in the state directory that systemd has created, if there is one."""
    folder = environ.get("STATE_DIRECTORY", "")
    return Path(folder, "state") if folder else None
