"""What fits a model and its documents: measured, on the user's own machine."""
