#!/usr/bin/env bash
# The runs of finetuning_regimes.md, all of one model: pre-training, then every regime with each seed.
#   docs/experiments/finetuning_regimes.sh switch_tiny 0 1 2
#   docs/experiments/finetuning_regimes.sh t5_tiny 0 1 2
# The same command goes on where it was stopped; ROOT is the folder of the runs, TASKS fewer tasks.
set -euo pipefail
model=$1
shift
root=${ROOT:-runs/finetuning_regimes}/$model
# Two that no mixture has, and one that is in it.
tasks=${TASKS:-sotu_period wn_define wn_supersense}
mixed="cldr_names,cmudict_g2p,date_iso,inflection,wn_hypernym_nli,wn_reverse_dictionary,wn_syn_ant"

python scripts/train.py --gin_file=gin_configs/$model.gin --gin.MODEL_DIR=$root/pretrained \
    --gin.TRAIN_STEPS=3000 --gin.EVAL_PERIOD=500 --gin.CHECKPOINT_PERIOD=500

finetune() { # regime, folder, flags
    python scripts/finetune.py --gin_file=gin_configs/runs/finetune_$1.gin --gin.MODEL_DIR=$2 \
        --gin.INITIAL_CHECKPOINT_PATH=$root/pretrained/checkpoints/3000 \
        --gin.BATCH_SIZE=8 --gin.EVAL_PERIOD=125 --gin.NUM_DECODED_EXAMPLES=0 \
        --gin.RANDOM_SEED=$seed --gin.SINGLE_TASKS="['${tasks// /\', \'}']" "${@:3}"
}

evaluate() { # run directory, tasks
    grep -q "\"test/${2##*,}\"" $1/metrics.jsonl && return
    python scripts/evaluate.py $1 --tasks=$2 --split=test --checkpoint=best --metrics=loss,decoded \
        --gin.EVAL_STEPS=None
}

for seed in "$@"; do
    runs=$root/seed_$seed
    finetune single $runs/single --gin.TRAIN_STEPS=250
    finetune single $runs/longer --gin.TRAIN_STEPS=750
    finetune combined $runs/combined --gin.TRAIN_STEPS=250 --gin.INSTRUCTION_STEPS=500
    evaluate $runs/combined/instruction ${tasks// /,},$mixed
    for task in $tasks; do
        for regime in single longer combined; do
            evaluate $runs/$regime/single/$task $task
        done
    done
done
