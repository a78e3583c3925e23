"""HTTP, TLS and TCP for probes: connections, requests, responses and certificates."""
