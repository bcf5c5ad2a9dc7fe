"""Writing pruned models and statistics, unit by unit."""
