"""A prompt as people write it and as tokens: messages, the words around chunks, spans."""
