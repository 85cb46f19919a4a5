#!/usr/bin/env bash
# A training program on one node or several.
#
#   sbatch --nodes=1 --gpus-per-node=8 launch/slurm/train.sh crossval --config h100x8_ddp \
#       data.shards=SHARED/shards output=SHARED/run
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm/train.sh crossval --config h100x8_ddp \
#       data.shards=SHARED/shards output=SHARED/run \
#       train.global_batch=1536 train.micro_batch=96 train.gradient_precision=bf16
#   LAUNCHER=deepspeed_zero2 sbatch ... (the same) only=trimodal train.ema_decay=0
#
# DeepSpeed keeps no averaged weights, and no running statistics of trained batch norms (dual_cnn) in bf16.
#
# Shards and output are in folders that every node sees. train.global_batch is ranks x train.micro_batch x accumulation
# steps. Over one network card per node, few lesions per GPU are no faster than one GPU: docs/clusters.md has the
# smallest number that pays off, by network. A larger global batch needs other learning rates.
#
# Before the time limit, on preemption, or on `scancel --signal=USR1 JOB`, the ranks save a checkpoint and the job is
# requeued; when it starts again it resumes. So --time may be far shorter than the training. A job whose node fails is
# requeued too, and resumes from the last checkpoint (train.save_every) on other nodes.
#
# Add the options that your site requires: --partition, --account, --mem, --cpus-per-task (4 to 8 per GPU, to decode
# photos).
#SBATCH --job-name=triderm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source "$(python -m triderm_dist config path slurm/common.sh)"

ranks "$@"
finish $?
