"""From structured vehicle attributes to the texts of a CLIP bank."""
