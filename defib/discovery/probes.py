"""Which probe shows best whether a thing works: that of a known API, else of a page, a port or a state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defib.discovery import known
from defib.discovery.model import Endpoint, Program
from defib.discovery.things import Thing
from fleet.managers import supervisor

_RANKS = {"mineru": 0, "vllm": 1, "ollama": 1, "openai": 2, "http": 3, "tcp": 5, "closed": 6}
_GOOD, _MOVED, _REFUSED = range(200, 300), range(300, 400), range(400, 500)
_TITLES = {"mineru": "MinerU", "vllm": "vLLM", "ollama": "Ollama", "openai": "OpenAI-compatible API"}
COMPLETION = {"every": "5m", "timeout": "1m"}  # a completion takes time of a GPU


@dataclass(frozen=True, slots=True)
class ChosenProbe:
    """A probe as in the configuration, and remarks on it."""

    probe: Mapping[str, Any]
    remarks: Sequence[str] = ()


def choose_endpoint(thing: Thing, endpoints: Mapping[int, Endpoint]) -> Endpoint | None:
    """Return the endpoint of a thing that shows most."""

    def rank(endpoint: Endpoint) -> tuple[int, int]:
        return _RANKS[endpoint.kind] + int(endpoint.kind == "http" and endpoint.status not in _GOOD), endpoint.port

    return min((endpoints[port] for port in thing.ports if port in endpoints), key=rank, default=None)


def describe_endpoint(endpoint: Endpoint) -> str:
    """Return what answers, such as `vLLM, model qwen3-32b`; nothing for a port that does not answer."""
    if endpoint.kind == "tcp":
        return known.PROTOCOLS.get(endpoint.port, "")
    if endpoint.kind == "http":
        title = f" “{endpoint.title}”" if endpoint.title else ""
        status = "" if endpoint.status in _GOOD else f", status {endpoint.status}"
        return f"{endpoint.scheme.upper()}{title}{status}"
    name = _TITLES.get(endpoint.kind, "")
    more = f" and {len(endpoint.models) - 1} more" if len(endpoint.models) > 1 else ""
    return f"{name}, model {endpoint.models[0]}{more}" if endpoint.models else name


def choose_probe(thing: Thing, endpoint: Endpoint | None) -> ChosenProbe:
    if endpoint is None or endpoint.kind == "closed":
        return _probe_state(thing, _find_obstacle(thing, endpoint))
    if endpoint.kind == "tcp":
        return _probe_port(thing, endpoint)
    if endpoint.kind == "mineru":
        return _probe_mineru(endpoint)
    if endpoint.kind in ("vllm", "openai"):
        return _probe_model(endpoint)
    if endpoint.kind == "ollama":
        remark = "a completion would load a model into the GPU's memory; to check one, use the probe `openai`"
        return ChosenProbe(_http(endpoint, "/api/tags"), [remark])
    return _probe_page(endpoint)


def _find_obstacle(thing: Thing, endpoint: Endpoint | None) -> Sequence[str]:
    """Return why the ports of a thing are not probed over the network."""
    ports = ", ".join(map(str, sorted(thing.ports)[:3]))
    listeners = [each for each in thing.ports.values() if each is not None]
    if listeners and all(each.only_loopback for each in listeners) and endpoint is None:
        return [f"listens on loopback only (port {ports}), so that it is checked on the host"]
    if endpoint is not None:
        return [f"port {ports} cannot be reached from this machine, so that it is checked on the host"]
    return ()


def _probe_state(thing: Thing, remarks: Sequence[str]) -> ChosenProbe:
    """Return the probe that runs over the host's shell."""
    if thing.kind in ("container", "unit"):
        return ChosenProbe({thing.kind: {"name": thing.name}}, remarks)
    if thing.program is not None:
        return ChosenProbe({"program": name_program("name", thing.program)}, remarks)
    return ChosenProbe({"port": {"listening": min(thing.ports)}}, remarks)


def name_program(key: str, program: Program) -> dict[str, str]:
    """Return the options that name a program, in a probe or a control."""
    own = {} if program.config == supervisor.config_name(None) else {"config": program.config}
    return {key: program.name, **own}


def _probe_port(thing: Thing, endpoint: Endpoint) -> ChosenProbe:
    # What docker forwards accepts connections even if nothing listens in the container.
    if thing.container is not None and any(each.port == endpoint.port for each in thing.container.ports):
        return _probe_state(
            thing, [f"port {endpoint.port} does not speak HTTP; docker accepts connections to it in any case"]
        )
    return ChosenProbe({"tcp": {"address": f"{{host.address}}:{endpoint.port}"}})


def _probe_mineru(endpoint: Endpoint) -> ChosenProbe:
    http = _http(endpoint, "/openapi.json", expect={"body_matches": "/file_parse"})
    remark = "to have a small PDF parsed each time, take the probe of deploy/examples/mineru.yaml"
    return ChosenProbe({"timeout": "30s", **http}, [remark])


def _probe_model(endpoint: Endpoint) -> ChosenProbe:
    model = next(filter(_is_usable, endpoint.models), None)
    if endpoint.needs_key:
        remark = "the API needs a key; for a completion, use the probe `openai` with `api_key: ${file:…}`"
        return ChosenProbe(_http(endpoint, "/health"), [remark])
    if model is None:
        return ChosenProbe(_http(endpoint, "/v1/models"))
    if known.NO_COMPLETIONS.search(model) is not None:
        return ChosenProbe(_http(endpoint, "/v1/models"), ["probably not a model for completions"])
    options = {"url": _url(endpoint, ""), "model": model, **_tls(endpoint)}
    return ChosenProbe({**COMPLETION, "openai": options}, _remarks_on_tls(endpoint))


def _is_usable(model: str) -> bool:
    """Whether a probe can name a model: placeholders in the name would be replaced."""
    return bool(model) and model.isprintable() and "{" not in model


def _probe_page(endpoint: Endpoint) -> ChosenProbe:
    more: dict[str, Any] = {}
    remarks = list(_remarks_on_tls(endpoint))
    if endpoint.status in _MOVED:
        more["follow_redirects"] = False
    if endpoint.status in (*_MOVED, *_REFUSED):
        more["expect"] = {"status": endpoint.status}
    elif endpoint.status not in _GOOD:
        remarks.append(f"answers with status {endpoint.status} now, which the probe reports as down")
    return ChosenProbe(_http(endpoint, endpoint.path, **more), remarks)


def _http(endpoint: Endpoint, path: str, **options: Any) -> dict[str, Any]:
    return {"http": {"url": _url(endpoint, path), **_tls(endpoint), **options}}


def _url(endpoint: Endpoint, path: str) -> str:
    return f"{endpoint.scheme}://{{host.address}}:{endpoint.port}{path}"


def _tls(endpoint: Endpoint) -> dict[str, Any]:
    return {} if endpoint.verified else {"tls": {"verify": False}}


def _remarks_on_tls(endpoint: Endpoint) -> Sequence[str]:
    remark = "the certificate cannot be verified with this machine's roots: better set `ca_file` than `verify: false`"
    return () if endpoint.verified else (remark,)
