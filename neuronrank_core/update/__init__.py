"""Re-fitting the weights that stay."""
