# shellcheck shell=bash
# Sourced by the scripts of this folder. They are submitted from the root of the repository, with the environment active
# in which it is installed; sbatch hands that environment on.
#
# What can be set when submitting:
#   LAUNCHER         accelerate file; default accelerate_configs/ddp.yaml, or a deepspeed_zero*.yaml
#   RANKS_PER_NODE   default: the GPUs that the job has on each node, or one rank without GPUs

# A port of this job's own, for jobs may share a node: above those of Ray's workers (10002 to 19999), below those that are
# handed out to clients (from 32768).
job_port() {
    echo $((20000 + SLURM_JOB_ID % 10000))
}

# Run a program as ranks on all nodes of the job: ranks PROGRAM [ARGUMENTS]. The status is that of the ranks: 0 done,
# 2 bad input, 3 interrupted. One Slurm task a node starts the node's ranks. The signal of --signal reaches launcher and
# ranks alike: Slurm sends it to every process of a step, and not to the batch script, which must not end before them.
ranks() {
    local nodes=$SLURM_JOB_NUM_NODES a_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local head port
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$(job_port)
    # --wait: a node that has ended gives the others a minute to end by themselves; by then they hang on a dead one.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --wait=60 bash -c \
        'exec python -m launch.ranks --machine_rank "$SLURM_NODEID" "$@"' launcher \
        --config_file "${LAUNCHER:-accelerate_configs/ddp.yaml}" --deepspeed_multinode_launcher standard \
        --num_machines "$nodes" --num_processes $((nodes * a_node)) \
        --main_process_ip "$head" --main_process_port "$port" -m "$@"
}

# End the job with a status; where it says "interrupted", put the job back into the queue, to go on where it stopped.
# After scancel nothing is put back: that ends this script too, before the ranks have saved.
finish() {
    case $1 in
        3 | 138) # 138: SIGUSR1 came before the launcher had begun
            # By the number of the job alone Slurm may take the whole array.
            scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
            ;;
    esac
    exit "$1"
}
