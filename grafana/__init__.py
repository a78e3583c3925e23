"""Grafana's provisioning, and the dashboards, which are written in Python and kept as JSON for Grafana to load."""
