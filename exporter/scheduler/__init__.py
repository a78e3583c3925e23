"""Run probes and collectors on their schedules and keep their results."""
