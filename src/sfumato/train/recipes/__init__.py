"""Recipes: what is trained, what the loss is, what comes out. One a file, `recipe(model, **settings) -> Task`."""
