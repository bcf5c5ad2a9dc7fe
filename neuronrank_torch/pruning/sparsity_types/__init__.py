"""What can be removed, one file each."""
