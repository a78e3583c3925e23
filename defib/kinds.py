"""Every kind of probe, control, channel and collector there is, for the inventory's model."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.inventory.kinds import KindTables
from remediator.execution.controls import CONTROLS
from remediator.notifications.channels import CHANNELS

KINDS = KindTables(probes=PROBES, controls=CONTROLS, collectors=COLLECTORS, channels=CHANNELS)
