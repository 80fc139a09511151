"""A model of transformers in this process: loading, encoding, linking, attention, decoding."""
