"""`defib doctor`: what an installation needs, what is missing, and how to mend it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import SecretStr

from defib.doctor import hosts, local, servers
from defib.doctor.findings import Finding, within
from fleet.inventory.documents import ConfigurationError
from fleet.inventory.loading import Loaded
from fleet.inventory.model import Host
from runtime import tokens
from runtime.errors import DefibError
from runtime.redaction import Redactor

HOSTS_AT_ONCE = 500
HOSTS_WITHIN, REST_WITHIN = 25.0, 25.0  # seconds, for all of them


async def doctor(
    load: Callable[[], Loaded], names: Sequence[str], *, token_file: Path | None, send: bool, as_json: bool
) -> int:
    """Check everything, or the hosts named alone, and print a line for each finding; 1 where something fails.

    With `send`, each channel is sent a test.
    """
    try:
        loaded = load()
    except ConfigurationError as error:
        mend = "mend it; `defib check` says all that is wrong, `defib init DIR` writes a first one"
        return _told([Finding("configuration", "loads", "fail", str(wrong), mend) for wrong in error.wrongs], as_json)
    except DefibError as error:
        mend = "`defib init DIR` writes a first one; --config or $DEFIB_CONFIG says where it is"
        return _told([Finding("configuration", "is there", "fail", str(error), mend)], as_json)
    if token_file is not None:
        loaded = _with_token(loaded, tokens.read(token_file))
    known = loaded.inventory.hosts
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DefibError(f"the inventory has no host {', '.join(unknown)}")
    chosen = [known[name] for name in names] or [host for host in known.values() if host.has_shell]
    looks = [_hosts(loaded, chosen)]
    if not names:
        looks += [_rest(loaded, send=send)]
    found = list(chain.from_iterable(reversed(await asyncio.gather(*looks))))
    redact = Redactor(loaded.secrets)
    return _told([replace(each, seen=redact(each.seen)) for each in found], as_json)


def _with_token(loaded: Loaded, token: SecretStr) -> Loaded:
    settings = loaded.inventory.remediator.model_copy(update={"token": token})
    inventory = loaded.inventory.model_copy(update={"remediator": settings})
    return Loaded(inventory, loaded.secrets | {token.get_secret_value()})


def _told(findings: Sequence[Finding], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"findings": [asdict(each) for each in findings]}, ensure_ascii=False))
    else:
        counts = {result: sum(1 for each in findings if each.result == result) for result in ("pass", "warn", "fail")}
        print("\n".join(map(str, findings)))
        print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return int(any(each.result == "fail" for each in findings))


async def _hosts(loaded: Loaded, chosen: Sequence[Host]) -> Sequence[Finding]:
    gate = asyncio.Semaphore(HOSTS_AT_ONCE)

    async def one(host: Host) -> Sequence[Finding]:
        async with gate:
            return await hosts.check(host, loaded.inventory)

    asked = (within(HOSTS_WITHIN, host.name, partial(one, host)) for host in chosen)
    return list(chain.from_iterable(await asyncio.gather(*asked)))


async def _rest(loaded: Loaded, *, send: bool) -> Sequence[Finding]:
    inventory, redact = loaded.inventory, Redactor(loaded.secrets)
    size = f"{len(inventory.hosts)} hosts, {len(inventory.services)} services"
    asked = [within(REST_WITHIN, name, partial(servers.guarded, name, look, inventory)) for name, look in servers.ALL]
    asked.append(within(REST_WITHIN, "notify", partial(local.channels, inventory, redact, send=send)))
    asked.insert(0, within(REST_WITHIN, "database", partial(asyncio.to_thread, local.record, inventory)))
    found = [Finding("configuration", "loads", "pass", size)]
    mend = "give them one service, or controls of different targets"
    found += [Finding("configuration", "targets", "warn", str(warning), mend) for warning in loaded.warnings]
    return [*found, *chain.from_iterable(await asyncio.gather(*asked))]
