"""Takes Alertmanager's webhook, restarts what may be restarted, verifies, and tells people."""
