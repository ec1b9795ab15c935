"""TensorFlow is imported late, and never near an accelerator."""

import subprocess
import sys

from switchx.data.backend import tf


def test_configuration_needs_no_tensorflow():
    code = (
        "import sys\n"
        "from switchx.data import pipeline\n"
        "config = pipeline.DataConfig(vocabulary='spm8k')\n"
        "assert pipeline.vocabulary_size(config) == 8100\n"
        "assert pipeline.decode_tokens(config, [8099, 1]) == '<extra_id_0>'\n"
        "assert not {'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tensorflow_sees_no_accelerator():
    assert tf.config.get_visible_devices("GPU") == []
    assert tf.config.get_visible_devices("TPU") == []
    assert len(tf.config.get_visible_devices("CPU")) == 1
