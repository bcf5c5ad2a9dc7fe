"""Pruning of a model: all layers, one layer, and the sparsity types."""
