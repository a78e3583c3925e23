"""Heartbeats: services that report themselves by pings. What is due when, the states, and their database."""
