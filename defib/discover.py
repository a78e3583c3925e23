"""`defib discover`: find what runs on hosts, and write services for what the user chooses."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from defib.discovery.model import Proposal
from defib.discovery.proposals import list_some
from defib.discovery.run import HostResult, as_json, discover_hosts
from defib.discovery.templates import HOSTS_AT_LEAST, Offer, SharedService, find_shared
from defib.discovery.writing import describe_alike, describe_rest, render, summarize
from defib.kinds import KINDS
from defib.lookup import HostSelection
from defib.output import format_count, format_table, print_json, print_text, terminal_width
from fleet.inventory.documents import as_map, read_directory
from fleet.inventory.loading import LoadedInventory, load
from fleet.inventory.problems import ConfigurationError
from runtime import logs
from runtime.errors import DefibError
from runtime.files import create_file
from runtime.redaction import Redactor
from runtime.terminal import one_line

TABLE_HEAD = ("WHAT", "PROBE", "CONTROL")
STDOUT = Path("-")
NEXT_PROBES, NEXT_HOSTS = 3, 5  # commands, and names of hosts in one, in the next steps
_ALL, _NONE = ("", "a", "all"), ("n", "no", "none")


@dataclass(frozen=True, slots=True)
class Output:
    """Where proposals go: `file` is `-` for stdout, and None for a new file in the configuration directory."""

    directory: Path
    file: Path | None = None
    without_asking: bool = False
    as_json: bool = False

    @property
    def asks(self) -> bool:
        """Whether a person chooses what to add."""
        scripted = self.without_asking or self.as_json or self.file == STDOUT
        return not scripted and sys.stdin.isatty() and sys.stdout.isatty()

    def check(self) -> None:
        """Raise DefibError if the file cannot be written, before hosts are read."""
        if self.file is not None and self.file != STDOUT:
            _check_new(self.file, self.directory)
        elif self.file is None and (self.asks or (self.without_asking and not self.as_json)):
            _check_directory(self.directory)


@dataclass(frozen=True, slots=True)
class Discovered:
    """The results of all hosts, and what is offered for the configuration."""

    results: Sequence[HostResult]
    shared: Sequence[SharedService]
    single: Sequence[Proposal]

    @property
    def offers(self) -> list[Offer]:
        """All that is offered; a person chooses by the number in this list."""
        return [*self.shared, *self.single]

    def render(self, chosen: Sequence[Offer]) -> str:
        return render([(result.found, result.proposed) for result in self.results], chosen)


async def discover(
    loaded: LoadedInventory, selection: HostSelection, directory: Path, administrator: str = ""
) -> Discovered:
    """Read the hosts, as the administrator if one is named. Raises DefibError."""
    logs.configure(Redactor(loaded.secrets))
    inventory, hosts = loaded.inventory, selection.find_hosts(loaded.inventory)
    loaded.require_resolved(*(section for host in hosts for section in loaded.connection_sections(host.name)))
    if sys.stderr.isatty():
        print_text(f"reading {format_count(len(hosts), 'host')} …", sys.stderr)
    written = read_directory(directory).value
    # Services that are not enabled have IDs, too.
    taken = {*inventory.services, *as_map(written.get("services"))}
    results = await discover_hosts(inventory, hosts, taken, administrator=administrator)
    proposals = [each for result in results for each in result.proposed.proposals]
    return Discovered(results, *find_shared(proposals, inventory.hosts, as_map(written.get("templates"))))


def present(discovered: Discovered, output: Output, redact: Redactor) -> int:
    """Print the results, and write what is chosen; return 1 if a host could not be read. Raises DefibError."""
    failed = [result for result in discovered.results if result.error]
    if output.as_json:
        _print_as_json(discovered, output, redact)
    elif output.asks:
        _ask(discovered, output, redact)
    else:
        for result in failed:
            print_text(redact(f"{result.host.name}: cannot be read: {one_line(result.error)}"), sys.stderr)
        _write_all(discovered, output)
    return int(bool(failed))


def _print_as_json(discovered: Discovered, output: Output, redact: Redactor) -> None:
    path = None
    if output.file not in (None, STDOUT) and discovered.offers:
        path = str(_write(discovered, discovered.offers, output, output.file))
    hosts = [as_json(result) for result in discovered.results]
    templates = [
        {"name": each.name, "for_hosts": each.for_hosts, "services": [one.id for one in each.proposals]}
        for each in discovered.shared
    ]
    print_json({"hosts": redact.redact_all(hosts), "templates": templates, "written": path})


def _write_all(discovered: Discovered, output: Output) -> None:
    """Write all that is offered: to a file with --yes or --output, else to stdout."""
    offers = discovered.offers
    if not offers:
        print_text("nothing to propose", sys.stderr)
    elif output.file == STDOUT or (output.file is None and not output.without_asking):
        sys.stdout.write(discovered.render(offers))
    else:
        path = _write(discovered, offers, output, output.file)
        print_text(_next_steps(discovered.results, offers, path, output.directory))


def _ask(discovered: Discovered, output: Output, redact: Redactor) -> None:
    """Show what was found, ask which services to add and where, and write them."""
    print_text(redact("\n\n".join(_describe(discovered))) + "\n")
    if not discovered.offers:
        print_text("nothing to propose")
        return
    chosen = _choose(discovered.offers)
    if not chosen:
        print_text("nothing was written")
        return
    proposed = default_path(discovered.results, output.directory)
    path = output.file or _ask_path(proposed, output.directory)
    if path is None:
        print_text("nothing was written")
        return
    path = _write(discovered, chosen, output, path)
    print_text(_next_steps(discovered.results, chosen, path, output.directory))


def _describe(discovered: Discovered) -> Iterator[str]:
    """Yield a text about what several hosts have alike, and one about each host."""
    numbers = {id(each): str(number) for number, each in enumerate(discovered.offers, 1)}
    if discovered.shared:
        rows = [(numbers[id(each)], *_table_row(each)) for each in discovered.shared]
        table = format_table([("#", "TEMPLATE", *TABLE_HEAD), *rows], terminal_width(), cut=2)
        yield f"alike on {HOSTS_AT_LEAST} hosts or more:\n{table}"
    hosts = []
    for result in discovered.results:
        own = [each for each in discovered.single if each.host == result.host.name]
        rows = [(numbers[id(each)], *_table_row(each)) for each in own]
        hosts.append((result.host.name, list(_describe_host(result, rows))))
    yield from describe_alike(hosts)


def _describe_host(result: HostResult, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if result.error:
        yield f"cannot be read: {one_line(result.error)}"
        return
    yield summarize(result.found)
    if rows:
        yield format_table([("#", "SERVICE", *TABLE_HEAD), *rows], terminal_width(), cut=2)
    if covered := result.proposed.covered:
        yield f"in the configuration already: {len(covered)} ({list_some(covered)})"
    yield from describe_rest(result.found, result.proposed)


def _table_row(offer: Offer) -> tuple[str, ...]:
    kind, control = next(reversed(offer.service["probe"])), next(iter(offer.service.get("control", {})), "none")
    if isinstance(offer, SharedService):
        hosts = f"{offer.proposals[0].host} … {offer.proposals[-1].host}"
        return offer.name, f"{len(offer.proposals)} hosts ({hosts}): {offer.what}", kind, control
    return offer.id, offer.what, kind, control


def _choose(offers: Sequence[Offer]) -> list[Offer]:
    while True:
        try:
            answer = input("Services to add (Enter = all, numbers like 1,3-5, n = none): ").strip().lower()
        except EOFError:
            return []
        numbers = parse_choice(answer, len(offers))
        if numbers is not None:
            return [offers[number - 1] for number in numbers]
        print_text(f"{answer!r} is not understood: write numbers from 1 to {len(offers)}, such as 1,3-5")


def parse_choice(answer: str, count: int) -> list[int] | None:
    """Return the chosen numbers of an answer such as `1,3-5`; None if it is not one."""
    if answer in _NONE:
        return []
    if answer in _ALL:
        return list(range(1, count + 1))
    chosen: set[int] = set()
    for part in re.split(r"[,\s]+", answer.strip(", ")):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= count:
            return None
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def _ask_path(proposed: Path, directory: Path) -> Path | None:
    """Return the file to write, in the configuration directory unless it is named with another one; None for none."""
    while True:
        try:
            answer = input(f"File to write (Enter = {proposed}, n = none): ").strip()
        except EOFError:
            return None
        if answer.lower() in _NONE:
            return None
        path = directory / answer if answer and "/" not in answer else Path(answer or proposed)
        if path.suffix not in (".yaml", ".yml"):
            print_text(f"{path}: write a name that ends in .yaml")
            continue
        try:
            _check_new(path, directory)
        except DefibError as error:
            print_text(str(error))
        else:
            return path


def default_path(results: Sequence[HostResult], directory: Path) -> Path:
    """Return a new file in the configuration directory: `discovered-HOST.yaml`, or `discovered.yaml` for several."""
    hosts = [result.host.name for result in results if not result.error]
    stem = f"discovered-{hosts[0]}" if len(hosts) == 1 else "discovered"
    path, number = directory / f"{stem}.yaml", 1
    while os.path.lexists(path):
        number += 1
        path = directory / f"{stem}-{number}.yaml"
    return path


def _check_new(path: Path, directory: Path) -> None:
    """Raise DefibError if a file exists, or would not be read although it is in the configuration directory."""
    if os.path.lexists(path):
        raise DefibError(f"{path}: exists already; existing files are not changed: choose another name")
    _check_directory(path.parent)
    hidden = path.suffix not in (".yaml", ".yml") or path.name.startswith(".")
    if hidden and path.absolute().parent.is_relative_to(directory.absolute()):
        raise DefibError(f"{path}: is not read as configuration: choose a name that ends in .yaml")


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise DefibError(f"{directory}: there is no such directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DefibError(f"{directory}: this user may not write there: use another one, or --output")


def _write(discovered: Discovered, chosen: Sequence[Offer], output: Output, path: Path | None) -> Path:
    """Write what is chosen to a new file, if the configuration loads with it. Raises DefibError."""
    path = path or default_path(discovered.results, output.directory)
    content = discovered.render(chosen).encode()
    try:
        load(output.directory, KINDS, programs=("exporter", "remediator"), strict=False, unsaved={path: content})
    except ConfigurationError as error:
        problem = f"{path} was not written, since the configuration with it would have errors"
        raise DefibError(f"{problem}:\n{error}") from error
    try:
        create_file(path, content, mode=0o644)
    except FileExistsError as error:
        raise DefibError(f"{path}: exists already; existing files are not changed: choose another name") from error
    return path


def _next_steps(results: Sequence[HostResult], chosen: Sequence[Offer], path: Path, directory: Path) -> str:
    services = [one for each in chosen for one in (each.proposals if isinstance(each, SharedService) else (each,))]
    hosts = {each.host for each in services}
    steps = [f"defib check --config {directory}"]
    concerned = [result.host for result in results if result.host.name in hosts]
    wrapped = [host.name for host in concerned if host.ssh_for(control=False).wrapper]
    if wrapped:
        named = " ".join(wrapped) if len(wrapped) <= NEXT_HOSTS else "--all"
        steps.append(f"defib host setup {named} --apply USER --config {directory}    # for what the wrapper must allow")
    steps += [f"defib probe {each.id} --config {directory}" for each in services[:NEXT_PROBES]]
    lines = "".join(f"  {step}\n" for step in steps)
    return (
        f"{path}: {format_count(len(services), 'service')}\nNext:\n{lines}Then reload the exporter and the remediator."
    )
