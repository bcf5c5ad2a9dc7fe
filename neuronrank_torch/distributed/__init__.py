"""The processes of a run: one, or several that share the calibration text."""
