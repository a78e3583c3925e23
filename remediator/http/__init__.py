"""The remediator's HTTP API."""
