"""Opens models, finds the prunable parts of their layers, reads and writes their tensors."""
