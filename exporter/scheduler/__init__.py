"""Schedules: when probes and collectors run, and their latest results."""
