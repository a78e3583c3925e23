"""What every program of ours needs: logging, HTTP serving, lifecycle."""

from importlib.metadata import version

VERSION = version("defib")
