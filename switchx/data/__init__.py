"""Text in, batches out. The only folder that imports TensorFlow."""
