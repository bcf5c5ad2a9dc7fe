"""Running calibration text through a model layer by layer, and collecting statistics on the way."""
