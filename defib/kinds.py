"""Every kind of probe, control, channel and collector there is, for the inventory's model."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.inventory.kinds import Kinds
from remediator.execution.controls import CONTROLS
from remediator.notifications.channels import CHANNELS

KINDS = Kinds(probes=PROBES, controls=CONTROLS, collectors=COLLECTORS, channels=CHANNELS)
