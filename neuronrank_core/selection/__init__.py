"""From scores to what is removed: weights by pattern, whole neurons, ratios between layers."""
