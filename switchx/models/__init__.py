"""Models: configuration, layers and the T5 encoder-decoder."""
