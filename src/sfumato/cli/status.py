"""Exit statuses of the command line."""

INTERRUPTED = 130
"""After SIGINT (Ctrl-C) or SIGTERM: 128 and the number of SIGINT, as shells have it."""
