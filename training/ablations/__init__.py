"""The ablations of the paper in miniature, one run directory a row."""
