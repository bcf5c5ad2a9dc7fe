"""Pruning a model: all layers, one layer, and what is removed."""
