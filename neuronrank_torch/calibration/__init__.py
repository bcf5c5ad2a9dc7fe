"""Run calibration text through a model layer by layer and collect statistics."""
