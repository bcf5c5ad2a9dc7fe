"""What a pruned model and its statistics look like, as plain data for a page: one file a section."""
