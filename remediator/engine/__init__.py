"""Decide about open incidents, reconcile with Alertmanager, and do periodic work."""
