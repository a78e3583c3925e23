"""Notifications: the outbox, content, rendering, the sender, escalation and channels."""
