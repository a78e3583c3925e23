"""Runs the commands of the documentation: finds them in pages, and starts machines on which they work as written."""
