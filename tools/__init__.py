"""Conveniences around the method: run them with `python -m tools.NAME --help`."""
