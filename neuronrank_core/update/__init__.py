"""Update of the remaining weights."""
