#!/usr/bin/env bash
# The scripts of this folder on a real Slurm of one's own, for a minute or two: a controller and two nodes, all on this
# machine and in a folder that is removed afterwards. Needs Debian's packages slurm-wlm and munge (or a Slurm elsewhere on the
# PATH), no root, no GPU:
#
#   launch/slurm/check.sh
#
# It trains a tiny network undisturbed, then again in a job that gets SIGUSR1, in one that a job of higher priority
# preempts with SIGTERM, and in an array over the folds; all were put back into the queue, went on and gave the same losses. A
# cancelled job stays cancelled, bad input is not tried again. Ends with 0 if all of that held.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
