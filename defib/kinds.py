"""Every kind of probe, control, channel and collector there is, for the inventory's model."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.kinds import Kinds
from remediator.controls import CONTROLS
from remediator.notices.channels import CHANNELS

KINDS = Kinds(probes=PROBES, controls=CONTROLS, collectors=COLLECTORS, channels=CHANNELS)
