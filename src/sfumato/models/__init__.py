"""The networks: Flax NNX modules, channel-last, whose attribute names are the checkpoint's paths."""
