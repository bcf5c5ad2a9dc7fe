"""Writes files and folders as a whole or not at all, and records the progress of a run."""
