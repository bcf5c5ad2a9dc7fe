"""Reads text from files and data sets, and turns it into sequences of tokens."""
