"""Drawn vehicles: the data of the quickstart and of the tests."""
