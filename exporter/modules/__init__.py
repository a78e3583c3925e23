"""blackbox_exporter's modules: its configuration file, as probes of ours, and its series."""
