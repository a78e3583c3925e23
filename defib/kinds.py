"""Every kind of probe, control, channel and collector there is, for the inventory's model."""

from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from fleet.model import Kinds
from remediator.controls import CONTROLS
from remediator.notices.channels import CHANNELS

KINDS = Kinds(
    probes={name: kind.options for name, kind in PROBES.items()},
    controls={name: kind.options for name, kind in CONTROLS.items()},
    collectors={name: kind.options for name, kind in COLLECTORS.items()},
    channels={name: kind.options for name, kind in CHANNELS.items()},
)
