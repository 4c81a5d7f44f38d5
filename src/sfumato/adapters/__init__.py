"""Adapters: LoRA and its relatives, and learned tokens; each makes another model out of a model."""
