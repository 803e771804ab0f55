"""Helpers shared by the stages; nothing here knows of flags or of one stage alone."""
