"""Train a model, or go on where an earlier run stopped.

python scripts/train.py --gin_file=gin_configs/switch_tiny.gin --gin.TRAIN_STEPS=1000
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while importing: no traceback

from switchx import configuration  # noqa: E402
from switchx.experiment import Experiment  # noqa: E402
from switchx.run import train  # noqa: E402

if __name__ == "__main__":
    configuration.main(Experiment, train, __doc__ or "")
