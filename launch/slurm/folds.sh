#!/usr/bin/env bash
# The folds of one model in parallel: one task of a job array per fold, then a job that gathers them.
#
#   folds=$(sbatch --parsable --array=0-4 --gpus-per-node=1 launch/slurm/folds.sh model=trimodal \
#       --config a100 data.shards=SHARED/shards output=SHARED/run)
#   sbatch --dependency=afterok:$folds --gpus-per-node=1 launch/slurm/train.sh crossval only=trimodal \
#       --config a100 data.shards=SHARED/shards output=SHARED/run
#
# The shards are packed before, in a folder that every node sees. `crossval` skips the folds that are done, trains the
# missing ones and writes oof.parquet. Submit one array per model; with a single model leave out `model=` and `only=`.
# With a frozen tower run fold 0 first: it fills the token cache, which parallel tasks would each compute.
# Preemption, time limit and site options: see train.sh.
#SBATCH --job-name=triderm-fold
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
source "$(python -m triderm_dist config path slurm/common.sh)"

ranks train "$@" fold="$SLURM_ARRAY_TASK_ID"
finish $?
