"""Released weights: where they are, how they come here, what they must answer to."""
