"""Clients of the exporter, Alertmanager and Prometheus, and the webhook's format."""
