"""What each command does, one file or folder a command."""
