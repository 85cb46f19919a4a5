#!/usr/bin/env bash
# Test of the scripts in launch/slurm on a real Slurm, takes a few minutes: starts a controller and two nodes on this
# machine, in a temporary folder. Needs Debian's packages slurm-wlm and munge, and an environment with this project;
# neither root nor a GPU:
#
#   tests/slurm/check.sh [FOLDER TO KEEP]
#
# A tiny network is trained on two nodes without interruption; then in a job that gets SIGUSR1, in a job preempted by one
# of higher priority (SIGTERM), and in an array over the folds of which one task gets SIGUSR1. All are requeued, resume,
# and give the losses of the uninterrupted run. A cancelled job is not requeued, invalid input is not retried, and a
# search runs on a Ray cluster over both nodes. Prints a line for each; exits with 0 if all checks pass.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
export OMP_NUM_THREADS=1

if [ $# -gt 0 ]; then
    mkdir -p "$1" && folder=$(realpath "$1")
else
    folder=$(mktemp -d)
fi
daemons=()
clean_up() {
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 60); do # wait for the processes of the jobs before stopping the daemons
        squeue --noheader 2>/dev/null | grep -q . || break
        sleep 1
    done
    [ ${#daemons[@]} -eq 0 ] || kill "${daemons[@]}" 2>/dev/null || true
    wait
    [ -n "${keep:-}" ] || rm -rf "$folder"
}
[ $# -gt 0 ] && keep=1
trap clean_up EXIT

# --- Slurm ---
free_ports() {
    python -c 'import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in sockets))'
}
read -r controller first second < <(free_ports)
machine=$(hostname -s)
mkdir -p "$folder/state" "$folder/jobs"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 700 "$folder" && chmod 400 "$folder/munge.key"
# Nodes are named by separate addresses, so that ranks connect without DNS. cred_expire: a requeued job waits until its
# old credential expires, 2 minutes by default.
cat >"$folder/slurm.conf" <<END
ClusterName=check
SlurmctldHost=$machine(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname=$machine NodeAddr=127.0.0.1 Port=$first CPUs=$(nproc)
NodeName=127.0.0.2 NodeHostname=$machine NodeAddr=127.0.0.2 Port=$second CPUs=$(nproc)
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
END
export SLURM_CONF=$folder/slurm.conf
munged --force --foreground --socket="$folder/munge.socket" --key-file="$folder/munge.key" --log-file="$folder/munged.log" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" &>/dev/null &
daemons+=($!)
until [ -S "$folder/munge.socket" ]; do sleep 0.1; done
slurmctld -D &>"$folder/slurmctld.out" &
daemons+=($!)
for node in 127.0.0.1 127.0.0.2; do
    mkdir -p "$folder/spool-$node"
    slurmd -D -N "$node" &>"$folder/slurmd-$node.out" &
    daemons+=($!)
done
until [ "$(sinfo --noheader --states=idle --partition=low --format=%D 2>/dev/null)" = 2 ]; do sleep 0.5; done

# --- data and helpers ---
cat >"$folder/tiny.yaml" <<'END'
data: {folds: 2}
train: {epochs: 6, global_batch: 16, micro_batch: 4, log_every: 1, optim: {lr: 1e-3, warmup_epochs: 1}}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 0, freeze_dermoscopic: 0}
END
python -m shards.demo output="$folder/demo" lesions=100 test_lesions=50 >/dev/null
python -m shards.pack source="$folder/demo/train" output="$folder/shards" short_side=null >/dev/null
settings=(--config "$folder/tiny.yaml" data.shards="$folder/shards")

submit() { # NAME [SBATCH OPTIONS] SCRIPT [ARGUMENTS]; prints the job ID
    sbatch --parsable --job-name="$1" --time=60 --output="$folder/jobs/%x.out" "${@:2}"
}
field() { # JOB FIELD: prints a field of a job
    local record
    for _ in 1 2 3 4 5; do # a busy controller may refuse a connection
        record=$(scontrol --oneliner show job "$1" 2>/dev/null) && break
        sleep 1
    done
    echo "$record" | grep -o " $2=[^ ]*" | head -n 1 | cut -d= -f2
}
fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$folder"/jobs/*.out >&2
    exit 1
}
steps() { # RUN FOLD: number of logged training steps
    grep -c '"kind": "train"' "$folder/$1/tri/fold-$2/metrics.jsonl" 2>/dev/null || true
}
await_steps() { # JOB RUN FOLD: waits for the third step, in the middle of an epoch
    until [ "$(steps "$2" "$3")" -ge 3 ] 2>/dev/null; do
        [[ $(field "$1" JobState) =~ PENDING|RUNNING|CONFIGURING ]] || fail "$2 ended before its third step"
        sleep 0.1
    done
}
await_end() { # JOB STATE
    while [[ $(field "$1" JobState) =~ PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUED ]]; do sleep 0.5; done
    [ "$(field "$1" JobState)" = "$2" ] || fail "job $1 is $(field "$1" JobState), not $2"
}
same_losses() { # RUN RUN FOLD [TOLERANCE]
    python - "$folder/$1/tri/fold-$3" "$folder/$2/tri/fold-$3" "${4:-0}" <<'END' || fail "the losses of $2 differ from those of $1"
import sys
from pathlib import Path
from triderm_dist.monitoring.metrics_log import read_metrics
one, other = ([(line["step"], line["loss"]) for line in read_metrics(Path(folder) / "metrics.jsonl")
               if line["kind"] == "train"] for folder in sys.argv[1:3])
steps = [step for step, _ in one]
difference = max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))
print(f"    {len(steps)} steps, largest difference of a loss {difference:g}")
sys.exit(steps != [step for step, _ in other] or difference > float(sys.argv[3]))
END
}

echo "uninterrupted, two nodes"
job=$(submit uninterrupted --nodes=2 launch/slurm/train.sh launch.crossval "${settings[@]}" output="$folder/uninterrupted")
await_end "$job" COMPLETED

echo "SIGUSR1 in the middle of an epoch"
job=$(submit signalled --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$folder/signalled")
await_steps "$job" signalled 0
scancel --signal=USR1 "$job"
await_end "$job" COMPLETED
[ "$(field "$job" Restarts)" = 1 ] || fail "requeued $(field "$job" Restarts) times, expected once"
same_losses uninterrupted signalled 0

echo "preempted by a job of higher priority"
job=$(submit preempted --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$folder/preempted")
await_steps "$job" preempted 0
urgent=$(submit urgent --nodes=2 --exclusive --partition=high --wrap "sleep 2")
await_end "$urgent" COMPLETED
await_end "$job" COMPLETED
[ "$(field "$job" Restarts)" = 1 ] || fail "requeued $(field "$job" Restarts) times, expected once"
same_losses uninterrupted preempted 0

echo "an array over the folds, task 1 signalled; then one job gathers the predictions"
array=$(submit folds --array=0-1 --output="$folder/jobs/%x-%a.out" launch/slurm/folds.sh "${settings[@]}" output="$folder/folds" model=tri)
gather=$(submit gather --nodes=1 --dependency=afterok:"$array" launch/slurm/train.sh launch.crossval "${settings[@]}" output="$folder/folds")
await_steps "${array}_1" folds 1
scancel --signal=USR1 "${array}_1"
await_end "${array}_0" COMPLETED
await_end "${array}_1" COMPLETED
[ "$(field "${array}_0" Restarts)" = 0 ] || fail "task 0 was requeued with task 1"
[ "$(field "${array}_1" Restarts)" = 1 ] || fail "task 1 was not requeued"
await_end "$gather" COMPLETED
[ -s "$folder/folds/oof.parquet" ] || fail "no out-of-fold table"
same_losses uninterrupted folds 0 1e-4 # one rank sums in another order than two
same_losses uninterrupted folds 1 1e-4

echo "cancelled, and invalid input"
job=$(submit cancelled --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$folder/cancelled")
await_steps "$job" cancelled 0
scancel "$job"
bad=$(submit bad --nodes=1 launch/slurm/train.sh launch.train "${settings[@]}" output="$folder/bad" fold=7)
await_end "$job" CANCELLED
await_end "$bad" FAILED
[ "$(field "$bad" ExitCode)" = 2:0 ] || fail "invalid input exited with $(field "$bad" ExitCode), expected 2"
grep -q "error: fold=7" "$folder/jobs/bad.out" || fail "no error message for invalid input"

echo "a search over both nodes"
job=$(submit sweep --nodes=2 launch/slurm/sweep.sh "${settings[@]}" train.epochs=1 space=tune/spaces/losses.yaml \
    search.trials=2 output="$folder/sweep")
await_end "$job" COMPLETED
[ -s "$folder/sweep/best.yaml" ] || fail "no best settings"

echo "all checks passed"
