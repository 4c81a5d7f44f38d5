"""Prompts and the tokens that text encoders read."""
