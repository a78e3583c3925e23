"""What reasons of failed probes say; the exporter publishes them and the remediator acts on them."""

# Reasons of probes that could not be carried out, which say nothing about the service.
UNDETERMINED = frozenset({"shell", "tls", "error"})
