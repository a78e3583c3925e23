"""The base of every program: logging, HTTP serving, lifecycle."""

from importlib.metadata import version

VERSION = version("defib")
