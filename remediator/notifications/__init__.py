"""Notifications: the outbox, rendering, the sender, escalation and channels."""
