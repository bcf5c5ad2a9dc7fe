"""One process, or several that share the calibration text."""
