"""`python -m tests.simulated_week [SEED]`: run the week, and print what it shows."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.simulated_week.run import run_week


def main() -> int:
    """Return 1 if there are too many needless notifications, or a fault is not notified in time."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulated_week", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    parser.add_argument("--fail-after", type=int, help="instead of the default of `probe.fail_after`")
    parser.add_argument("--verbose", action="store_true", help="list every notification, and show the progress")
    chosen = parser.parse_args()
    probe = {} if chosen.fail_after is None else {"fail_after": chosen.fail_after}
    with tempfile.TemporaryDirectory(prefix="simulated-week-") as folder:
        report = run_week(Path(folder), chosen.seed, probe, progress=print if chosen.verbose else lambda text: None)
    for line in report.lines():
        print(line)
    return 0 if report.is_good else 1


sys.exit(main())
