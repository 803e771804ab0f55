"""Arrays in, numbers out: what results are measured with."""
