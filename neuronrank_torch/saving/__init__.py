"""Writes pruned models and statistics, one unit at a time."""
