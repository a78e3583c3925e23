"""The HTTP API: webhook, metrics, reading and operations."""
