"""switchx: Switch Transformers and their relatives in JAX.

One legend of dimension letters for the whole package. A name such as ``x_BTD`` is an array of
shape [batch, target length, d_model]; letters are logical dimensions, never shards.

    B  batch (rows of the global batch)     V  vocabulary
    T  query or target length               L  layers
    S  key or source length                 E  experts
    D  d_model                              C  slots per expert (capacity)
    H  attention heads                      K  experts per token
    J  key-value heads                      G  routing groups
    P  per-head width (head_dim)            M  tokens in a routing group
    F  feed-forward width (d_ff)            N  tokens, flattened over rows
"""

__version__ = "0.1.0"
