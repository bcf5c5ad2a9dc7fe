"""Models: opening them, what can be pruned in a layer, reading and writing their tensors."""
