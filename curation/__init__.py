"""From a pool of images to a balanced sample: the parts of main_curate.py."""
