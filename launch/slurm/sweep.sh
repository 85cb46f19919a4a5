#!/usr/bin/env bash
# A search with Ray Tune over all nodes of the job, from the root of the repository:
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm/sweep.sh --config launch/experiments/a100.yaml \
#       space=tune/spaces/losses.yaml trials=48 data.shards=SHARED/shards output=SHARED/search
#
# `output=` must be given. The folder lies where every node sees it, and so do the shards. Submitted again, or put back
# by Slurm, the search goes on: no finished trial runs again, and a running one goes on from its last epoch.
#
# Add what your site asks for: --partition, --account, --cpus-per-task (all cores of the node: trials share them), --mem.
#SBATCH --job-name=triderm-sweep
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source launch/slurm/common.sh

for word in "$@"; do
    case $word in output=*) output=${word#output=} ;; esac
done
: "${output:?output=FOLDER must be given}"
words=("$@")
[ -f "$output/search/search.yaml" ] && words+=(resume=true)

# Here the batch script is told (B:), not the steps: a signal would kill Ray. The trials have saved each epoch.
trap 'finish 3' USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RAY_HEAD=$head:$(job_port)
RAY_FOLDER=${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
# A token of this job's own: other people's jobs on these nodes can't use its cluster, nor meet it by mistake.
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
RAY_USAGE_STATS_ENABLED=0
export RAY_HEAD RAY_FOLDER RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=60 bash -c '
    own=(--block --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
    if [ "$SLURM_NODEID" -gt 0 ]; then
        until ray health-check --address="$RAY_HEAD" 2>/dev/null; do sleep 2; done
        ray start --address="$RAY_HEAD" "${own[@]}"
        exit 0 # the head has gone, and with it the search has ended
    fi
    ray start --head --port="${RAY_HEAD##*:}" --temp-dir="$RAY_FOLDER" --include-dashboard=false "${own[@]}" &
    until ray health-check --address="$RAY_HEAD" 2>/dev/null; do sleep 2; done
    python -m tune.search "$@" search.address="$RAY_HEAD"
    status=$?
    kill %1 # stops what it has started
    wait
    exit $status
' search "${words[@]}" &
wait $!
finish $?
