#!/usr/bin/env bash
# A search with Ray Tune over all nodes of the job.
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm/sweep.sh --config a100 \
#       space=losses trials=48 data.shards=SHARED/shards output=SHARED/search
#
# `output=` is required. Output and shards are in folders that every node sees. Submitted again, or requeued by Slurm,
# the search resumes: finished trials are kept, and running ones resume from their last epoch.
#
# Add the options that your site requires: --partition, --account, --mem, --cpus-per-task (all cores of the node: trials
# share them).
#SBATCH --job-name=triderm-sweep
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source "$(python -m triderm_dist config path slurm/common.sh)"

for word in "$@"; do
    case $word in output=*) output=${word#output=} ;; esac
done
: "${output:?output=FOLDER must be given}"
words=("$@")
[ -f "$output/search/search.yaml" ] && words+=(resume=true)

# The signal goes to the batch script (B:), not to the steps, where it would kill Ray. Trials save every epoch.
trap 'finish 3' USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RAY_HEAD=$head:$(job_port)
RAY_FOLDER=${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
# A token per job: other jobs on these nodes can neither use this cluster nor join it by mistake.
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
RAY_USAGE_STATS_ENABLED=0
export RAY_HEAD RAY_FOLDER RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=60 bash -c '
    own=(--block --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
    if [ "$SLURM_NODEID" -gt 0 ]; then
        until ray health-check --address="$RAY_HEAD" 2>/dev/null; do sleep 2; done
        ray start --address="$RAY_HEAD" "${own[@]}"
        exit 0 # the head has stopped: the search has ended
    fi
    ray start --head --port="${RAY_HEAD##*:}" --temp-dir="$RAY_FOLDER" --include-dashboard=false "${own[@]}" &
    until ray health-check --address="$RAY_HEAD" 2>/dev/null; do sleep 2; done
    python -m triderm_dist.commands.search "$@" search.address="$RAY_HEAD"
    status=$?
    kill %1 # stops Ray on this node
    wait
    exit $status
' search "${words[@]}" &
wait $!
finish $?
