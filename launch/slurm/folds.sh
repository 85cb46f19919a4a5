#!/usr/bin/env bash
# The folds of one model side by side, a task of a job array each; then a job that gathers them. From the root of the
# repository, with shards already packed where every node sees them:
#
#   folds=$(sbatch --parsable --array=0-4 --gpus-per-node=1 launch/slurm/folds.sh model=trimodal \
#       --config launch/experiments/a100.yaml data.shards=SHARED/shards output=SHARED/run)
#   sbatch --dependency=afterok:$folds --gpus-per-node=1 launch/slurm/train.sh launch.crossval only=[trimodal] \
#       --config launch/experiments/a100.yaml data.shards=SHARED/shards output=SHARED/run
#
# launch.crossval finds the folds trained, trains what is missing and writes oof.parquet. One array a model; leave
# `model=` and `only=` away where there is one. For a frozen tower let fold 0 run alone first: it fills the token cache,
# which tasks that start together would each compute. Preemption, time limit and what to add: see train.sh.
#SBATCH --job-name=triderm-fold
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
source launch/slurm/common.sh

ranks launch.train "$@" fold="$SLURM_ARRAY_TASK_ID"
finish $?
