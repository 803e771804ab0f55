"""The downstream tasks: what is trained and scored beyond pre-training."""
