"""`defib check`: every error in the configuration, or what it comes to."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from defib.kinds import KINDS
from fleet.loading import PROGRAMS, load
from fleet.model import json_schema
from fleet.references import Program


def check(directory: Path, program: Program | None, *, show: bool) -> int:
    """Load for `program`, or for all. Raises ConfigurationError."""
    loaded = load(directory, KINDS, programs=(program,) if program else PROGRAMS)
    if show:
        # References stay as they were written; secrets that stand in the files print masked.
        unresolved = load(directory, KINDS, programs=()).inventory
        shown: Any = json.loads(unresolved.model_dump_json(by_alias=True, exclude_none=True))
        yaml.safe_dump(shown, sys.stdout, allow_unicode=True, sort_keys=False)
        return 0
    inventory = loaded.inventory
    print(f"{directory}: {len(inventory.hosts)} hosts, {len(inventory.services)} services, no errors")
    return 0


def schema() -> int:
    print(json.dumps(json_schema(KINDS), indent=2, ensure_ascii=False))
    return 0
