"""The command line: parses, calls one job, prints."""

from .app import app, main

__all__ = ["app", "main"]
