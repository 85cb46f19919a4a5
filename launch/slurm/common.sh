# Functions that the scripts in this folder share: port, ranks, requeue.
# shellcheck shell=bash
#
# The scripts are submitted with the Python environment active in which triderm-dist is installed; sbatch passes that
# environment on. Environment variables that may be set when submitting:
#   LAUNCHER         accelerate file, or the name of a shipped one: ddp (default), fsdp2, deepspeed_zero2, ...
#   RANKS_PER_NODE   default: the GPUs that the job has on each node, or 1 without GPUs

# Print a port for this job, since jobs may share a node: above the ports of Ray's workers (10002 to 19999), below the
# ephemeral ones (from 32768).
job_port() {
    echo $((20000 + SLURM_JOB_ID % 10000))
}

# ranks PROGRAM [ARGUMENTS]: run a program as ranks on all nodes of the job. Returns their exit code: 0 success,
# 2 invalid input, 3 interrupted. One Slurm task per node starts the node's ranks. Slurm sends the signal of --signal to
# every process of a step, launcher and ranks alike, but not to the batch script, which has to outlive them.
ranks() {
    local nodes=$SLURM_JOB_NUM_NODES per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local head port
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$(job_port)
    # --wait: after one node has ended, the others get a minute to end, since they may hang waiting for a dead one.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --wait=60 bash -c \
        'exec python -m triderm_dist.commands.ranks --machine_rank "$SLURM_NODEID" "$@"' launcher \
        --config_file "${LAUNCHER:-ddp}" --deepspeed_multinode_launcher standard \
        --num_machines "$nodes" --num_processes $((nodes * per_node)) \
        --main_process_ip "$head" --main_process_port "$port" -m "$@"
}

# finish CODE: end the job with an exit code; on 3 (interrupted), requeue the job first, to resume later.
# After scancel nothing is requeued: scancel ends this script too, before the ranks have saved.
finish() {
    case $1 in
        3 | 138) # 138: SIGUSR1 arrived before the launcher was ready
            # Given the job id alone, Slurm may requeue the whole array.
            scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
            ;;
    esac
    exit "$1"
}
