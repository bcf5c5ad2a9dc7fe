"""Text: where it comes from, and how it becomes sequences of tokens."""
