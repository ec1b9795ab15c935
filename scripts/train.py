"""Train a model, or go on where an earlier run stopped.

python scripts/train.py --gin_file=gin_configs/switch_tiny.gin --gin.TRAIN_STEPS=1000
"""

from switchx import process

process.prepare()

from switchx import configuration
from switchx.experiment import Experiment
from switchx.run import train

if __name__ == "__main__":
    configuration.main(Experiment, train, __doc__ or "")
