"""How sfumato's embedded default model is made."""
