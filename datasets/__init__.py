"""Data sets: readers, transforms and the demo picture renderer."""
