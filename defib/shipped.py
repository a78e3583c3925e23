"""Files that come with this version of Defib, beside its packages."""

import sys
from pathlib import Path

from runtime.errors import DefibError


def find_shipped() -> Path:
    """Return the directory with `alerts/` and `grafana/`. Raises DefibError."""
    places = (Path(__file__).parents[1], Path(sys.prefix) / "share" / "defib")
    for place in places:
        if (place / "alerts" / "prometheus.yml").is_file():
            return place
    raise DefibError(f"alerts/prometheus.yml is missing (in {' and '.join(map(str, places))}): install Defib again")
