"""`defib check`: every error in the configuration, or what it comes to."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from defib.kinds import KINDS
from fleet.inventory.loading import PROGRAMS, load
from fleet.inventory.model import Inventory, json_schema
from fleet.inventory.references import Program
from runtime.redaction import Redactor


def check(directory: Path, program: Program | None, *, show: bool) -> int:
    """Load for `program`, or for all, and try the templates of cards. Raises ConfigurationError."""
    loaded = load(directory, KINDS, programs=(program,) if program else PROGRAMS)
    inventory = loaded.inventory
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    wrongs = _wrong_templates(inventory) if program != "exporter" else []
    if wrongs:
        print("\n".join(wrongs), file=sys.stderr)
        return 1
    if show:
        shown: Any = json.loads(inventory.model_dump_json(by_alias=True, exclude_none=True))
        print(Redactor(loaded.secrets)(yaml.safe_dump(shown, allow_unicode=True, sort_keys=False)), end="")
    else:
        print(f"{directory}: {len(inventory.hosts)} hosts, {len(inventory.services)} services, no errors")
    return 0


def _wrong_templates(inventory: Inventory) -> list[str]:
    if inventory.notify.templates is None:
        return []
    from remediator.notifications import samples

    return list(samples.check_templates(inventory))


def schema() -> int:
    print(json.dumps(json_schema(KINDS), indent=2, ensure_ascii=False))
    return 0
