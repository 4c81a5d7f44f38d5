"""How good the embedded model is, in figures: `python -m benchmarks.quality MODEL --art FOLDER`."""
