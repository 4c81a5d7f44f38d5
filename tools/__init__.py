"""What makes the files that sfumato ships, and is itself not shipped."""
