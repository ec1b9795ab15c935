"""EleutherAI's lm-evaluation-harness, its whole command line, with the model 'switchx' in it.

python scripts/lm_harness.py run --model switchx --model_args run_directory=runs/switch_tiny \
    --include_path docs/lm_eval --tasks syn_ant
"""

from switchx import process

process.prepare()

from switchx import command_line, harness

if __name__ == "__main__":
    command_line.run(harness.main)
