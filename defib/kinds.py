"""All kinds of probes, controls, channels and collectors, for the model of the inventory."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.inventory.kinds import KindTables
from remediator.execution.controls import CONTROLS
from remediator.notifications.channels import CHANNELS

KINDS = KindTables(probes=PROBES, controls=CONTROLS, collectors=COLLECTORS, channels=CHANNELS)
