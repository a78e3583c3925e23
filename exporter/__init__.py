"""The exporter: probes services, collects from hosts, and publishes the results on `/metrics`."""
