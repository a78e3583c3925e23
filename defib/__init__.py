"""The command line, the one front door."""
