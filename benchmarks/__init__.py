"""Measurements behind docs/PERFORMANCE.md: two ways of the same work take turns in one run."""
