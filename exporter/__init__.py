"""Probes every service on its own clock and publishes what it saw on `/metrics`."""
