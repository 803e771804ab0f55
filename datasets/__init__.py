"""Data sets: readers, transforms, samplers."""
