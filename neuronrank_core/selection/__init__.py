"""Selection by score: weights by pattern, whole neurons, sparsity ratios per layer."""
