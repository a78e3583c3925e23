"""Grafana's provisioning and dashboards. The dashboards are defined in Python; Grafana loads the generated JSON."""
