"""Emoji art with names, keywords, masks and regions: the pictures that the embedded model is trained on."""
