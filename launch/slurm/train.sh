#!/usr/bin/env bash
# A training program on one node or on many, from the root of the repository:
#
#   sbatch --nodes=1 --gpus-per-node=8 launch/slurm/train.sh launch.crossval --config launch/experiments/h100x8.yaml \
#       data.shards=SHARED/shards output=SHARED/run
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm/train.sh launch.crossval --config launch/experiments/h100x8.yaml \
#       data.shards=SHARED/shards output=SHARED/run train.micro_batch=6
#   LAUNCHER=accelerate_configs/deepspeed_zero2.yaml sbatch ... (the same)
#
# Shards and output lie where every node sees them. train.global_batch is ranks x train.micro_batch x accumulation, so
# more nodes want a smaller micro-batch; the numbers of the run stay the same.
#
# Before the time is up, when the job is preempted or told by `scancel --signal=USR1 JOB`, the ranks save, the job goes
# back into the queue and later goes on where it stopped. So --time may be far less than the training takes. A node that
# fails puts the job back too; it goes on from the last checkpoint (train.save_every) on other nodes.
#
# Add what your site asks for: --partition, --account, --cpus-per-task (4 to 8 a GPU: they decode photos), --mem.
#SBATCH --job-name=triderm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source launch/slurm/common.sh

ranks "$@"
finish $?
