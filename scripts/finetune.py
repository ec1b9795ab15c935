"""Fine-tune in a regime: stage after stage, each a run directory; the same command goes on.

python scripts/finetune.py --gin_file=gin_configs/runs/finetune_combined.gin \
    --gin.INITIAL_CHECKPOINT_PATH=runs/switch_tiny
"""

from switchx import process

process.prepare()

from switchx import configuration, regime

if __name__ == "__main__":
    configuration.main(regime.Regime, regime.run, __doc__ or "")
