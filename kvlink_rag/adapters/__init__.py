"""What training makes and `link` needs: link tokens and LoRA, on disk and in a model."""
