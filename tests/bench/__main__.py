"""`make bench`: what it costs, against peers in the same run, as ratios."""

import sys

from tests.bench import (
    access,
    collect,
    console,
    gateway,
    heartbeats,
    hosts,
    loop,
    notifications,
    probes,
    remediator,
    rules,
    scale,
    scrape,
    start,
)

BENCHES = {
    "start": start.run,
    "probes": probes.run,
    "scale": scale.run,
    "scrape": scrape.run,
    "hosts": hosts.run,
    "collect": collect.run,
    "remediator": remediator.run,
    "notifications": notifications.run,
    "rules": rules.run,
    "access": access.run,
    "console": console.run,
    "loop": loop.run,
    "heartbeats": heartbeats.run,
    "gateway": gateway.run,
}


def main() -> int:
    """Run the benches named, or all; 1 if a figure is worse than it must be."""
    chosen = sys.argv[1:] or list(BENCHES)
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        print(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
        return 2
    good = [BENCHES[name]() for name in chosen]
    return 0 if all(good) else 1


sys.exit(main())
