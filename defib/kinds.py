"""All kinds of probes, controls, channels and collectors, for the model of the inventory."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.inventory.kinds import Kinds
from remediator.execution.controls import CONTROLS
from remediator.notifications.channels import CHANNELS

KINDS = Kinds(probes=PROBES, controls=CONTROLS, collectors=COLLECTORS, channels=CHANNELS)
