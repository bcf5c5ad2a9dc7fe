"""Files that are complete or absent: durable writes, resumable folders, the journal, JSON."""
