"""Talking to what is probed: connections, TLS, HTTP, dialogues."""
