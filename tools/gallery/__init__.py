"""The pictures of docs/gallery, each with the command or the lines that make it."""
