"""The command line: parses the options, calls one job and prints the result."""

from .app import app, main

__all__ = ["app", "main"]
