"""Everything between a file on disk and a model in memory."""
