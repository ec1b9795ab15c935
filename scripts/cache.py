"""Tokenise the task of a configuration, or the tasks of its mixture, into token caches.

python scripts/cache.py --gin_file=gin_configs/switch_tiny.gin \
    --gin.MIXTURE_OR_TASK_NAME=wn_define
"""

from switchx import process

process.prepare()

from switchx import configuration
from switchx.data import pipeline
from switchx.experiment import Experiment

if __name__ == "__main__":
    configuration.main(Experiment, lambda run, _: pipeline.cache(run.data), __doc__ or "")
