"""Telling people: the outbox, what it says, the sender, and the kinds of channels."""
