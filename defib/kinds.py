"""Every kind of probe, control and channel there is, for the inventory's model."""

from exporter.probes import PROBES
from fleet.model import Kinds
from remediator.controls import CONTROLS
from remediator.notices import CHANNELS

KINDS = Kinds(
    probes={name: kind.options for name, kind in PROBES.items()},
    controls={name: kind.options for name, kind in CONTROLS.items()},
    channels={name: kind.options for name, kind in CHANNELS.items()},
)
