"""TensorFlow and seqio, quiet and kept off accelerators. Import both from here, nowhere else.

Importing this module costs several seconds, so everything a configuration needs (vocabulary,
corpus, tasks, mixtures, pipeline) imports it inside the functions that use it.
"""

import os
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Nothing here multiplies matrices, and oneDNN complains about integer types it does not have.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import absl.logging  # noqa: E402
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

# seqio warns about every uncached task; these are choices here, not surprises.
absl.logging.set_verbosity(absl.logging.ERROR)
tf.get_logger().setLevel("ERROR")

# The accelerator's memory belongs to JAX. This must run before TensorFlow's first op.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

# seqio hands map seeds out through a module global, so two datasets must not be built at once
# (a training pipeline in a background thread, an evaluation set in the main one).
BUILD_LOCK = threading.RLock()

__all__ = ["BUILD_LOCK", "seqio", "tf"]
