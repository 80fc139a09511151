"""Training of adapters: link tokens and LoRA."""
