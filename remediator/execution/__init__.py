"""Carry out actions on hosts, verify their result, and collect evidence."""
