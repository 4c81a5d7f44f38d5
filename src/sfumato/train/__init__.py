"""Training: recipes say what is trained and what the loss is, and one loop does the rest.

`objective` and `denoising` are the loss that all diffusion recipes share, `recipes/` one file for each thing that is
trained, `data` the pictures, `fit` the loop. Needs `pip install sfumato[train]`; nothing of it is imported by sampling.
"""
