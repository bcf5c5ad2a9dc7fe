"""Checking torch against the reference on a user's own model and device."""
