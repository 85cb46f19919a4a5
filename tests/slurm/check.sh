#!/usr/bin/env bash
# The scripts of launch/slurm on a real Slurm, a few minutes: a controller and two nodes, all on this machine and in a
# folder that is removed afterwards. Needs Debian's packages slurm-wlm and munge, the environment in which this project
# is installed, no root and no GPU:
#
#   tests/slurm/check.sh [FOLDER TO KEEP]
#
# A tiny network is trained undisturbed on two nodes; then in a job that gets SIGUSR1, in one that a job of higher
# priority preempts (SIGTERM), and in an array over the folds of which one task gets SIGUSR1. All are put back into the
# queue, go on, and give the losses of the undisturbed run. A cancelled job stays cancelled, bad input is not tried again, and a search
# runs on a Ray cluster over both nodes. Prints a line for each; ends with 0 if all of that held.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
export OMP_NUM_THREADS=1

if [ $# -gt 0 ]; then
    mkdir -p "$1" && here=$(realpath "$1")
else
    here=$(mktemp -d)
fi
daemons=()
clean_up() {
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 60); do # the jobs' own processes end before the daemons do
        squeue --noheader 2>/dev/null | grep -q . || break
        sleep 1
    done
    [ ${#daemons[@]} -eq 0 ] || kill "${daemons[@]}" 2>/dev/null || true
    wait
    [ -n "${keep:-}" ] || rm -rf "$here"
}
[ $# -gt 0 ] && keep=1
trap clean_up EXIT

# --- Slurm ---
free_ports() {
    python -c 'import socket, sys
taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in taken))'
}
read -r controller first second < <(free_ports)
machine=$(hostname -s)
mkdir -p "$here/state" "$here/jobs"
head -c 1024 /dev/urandom >"$here/munge.key"
chmod 700 "$here" && chmod 400 "$here/munge.key"
# Nodes are named by addresses of their own, so that ranks find one another without DNS. cred_expire: a job that is put
# back waits for its old credential to expire, 2 minutes by default.
cat >"$here/slurm.conf" <<END
ClusterName=check
SlurmctldHost=$machine(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$here/munge.socket,cred_expire=5
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool-%n
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd-%n.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd-%n.log
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
export SLURM_CONF=$here/slurm.conf
munged --force --foreground --socket="$here/munge.socket" --key-file="$here/munge.key" --log-file="$here/munged.log" \
    --pid-file="$here/munged.pid" --seed-file="$here/munged.seed" &>/dev/null &
daemons+=($!)
until [ -S "$here/munge.socket" ]; do sleep 0.1; done
slurmctld -D &>"$here/slurmctld.out" &
daemons+=($!)
for node in 127.0.0.1 127.0.0.2; do
    mkdir -p "$here/spool-$node"
    slurmd -D -N "$node" &>"$here/slurmd-$node.out" &
    daemons+=($!)
done
until [ "$(sinfo --noheader --states=idle --partition=low --format=%D 2>/dev/null)" = 2 ]; do sleep 0.5; done

# --- what the jobs do ---
cat >"$here/tiny.yaml" <<'END'
data: {folds: 2}
train: {epochs: 6, global_batch: 16, micro_batch: 4, log_every: 1, optim: {lr: 1e-3, warmup_epochs: 1}}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 0, freeze_dermoscopic: 0}
END
python -m shards.demo output="$here/demo" lesions=100 test_lesions=50 >/dev/null
python -m shards.pack source="$here/demo/train" output="$here/shards" short_side=null >/dev/null
settings=(--config "$here/tiny.yaml" data.shards="$here/shards")

submit() { # NAME [SBATCH OPTIONS] SCRIPT [ARGUMENTS]; prints the number of the job
    sbatch --parsable --job-name="$1" --time=60 --output="$here/jobs/%x.out" "${@:2}"
}
field() { # JOB FIELD: what Slurm says of a job
    local said
    for _ in 1 2 3 4 5; do # a busy controller may refuse a connection
        said=$(scontrol --oneliner show job "$1" 2>/dev/null) && break
        sleep 1
    done
    echo "$said" | grep -o " $2=[^ ]*" | head -n 1 | cut -d= -f2
}
fail() {
    echo "FAILED: $*" >&2
    tail -n 20 "$here"/jobs/*.out >&2
    exit 1
}
steps() { # RUN FOLD: how many steps its metrics tell of
    grep -c '"kind": "train"' "$here/$1/tri/fold-$2/metrics.jsonl" 2>/dev/null || true
}
await_steps() { # JOB RUN FOLD: the third step, in the middle of an epoch
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
    python - "$here/$1/tri/fold-$3" "$here/$2/tri/fold-$3" "${4:-0}" <<'END' || fail "the losses of $2 are not those of $1"
import sys
from pathlib import Path
from triderm_dist.monitoring.metrics_log import read_metrics
one, other = ([(line["step"], line["loss"]) for line in read_metrics(Path(folder) / "metrics.jsonl")
               if line["kind"] == "train"] for folder in sys.argv[1:3])
steps = [step for step, _ in one]
far = max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))
print(f"    {len(steps)} steps, largest difference of a loss {far:g}")
sys.exit(steps != [step for step, _ in other] or far > float(sys.argv[3]))
END
}

echo "undisturbed, two nodes"
job=$(submit undisturbed --nodes=2 launch/slurm/train.sh launch.crossval "${settings[@]}" output="$here/undisturbed")
await_end "$job" COMPLETED

echo "SIGUSR1 in mid-epoch"
job=$(submit signalled --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$here/signalled")
await_steps "$job" signalled 0
scancel --signal=USR1 "$job"
await_end "$job" COMPLETED
[ "$(field "$job" Restarts)" = 1 ] || fail "put back $(field "$job" Restarts) times, not once"
same_losses undisturbed signalled 0

echo "preempted by a job of higher priority"
job=$(submit preempted --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$here/preempted")
await_steps "$job" preempted 0
urgent=$(submit urgent --nodes=2 --exclusive --partition=high --wrap "sleep 2")
await_end "$urgent" COMPLETED
await_end "$job" COMPLETED
[ "$(field "$job" Restarts)" = 1 ] || fail "put back $(field "$job" Restarts) times, not once"
same_losses undisturbed preempted 0

echo "an array over the folds, task 1 signalled; then one job gathers"
array=$(submit folds --array=0-1 --output="$here/jobs/%x-%a.out" launch/slurm/folds.sh "${settings[@]}" output="$here/folds" model=tri)
gather=$(submit gather --nodes=1 --dependency=afterok:"$array" launch/slurm/train.sh launch.crossval "${settings[@]}" output="$here/folds")
await_steps "${array}_1" folds 1
scancel --signal=USR1 "${array}_1"
await_end "${array}_0" COMPLETED
await_end "${array}_1" COMPLETED
[ "$(field "${array}_0" Restarts)" = 0 ] || fail "task 0 was put back with task 1"
[ "$(field "${array}_1" Restarts)" = 1 ] || fail "task 1 was not put back"
await_end "$gather" COMPLETED
[ -s "$here/folds/oof.parquet" ] || fail "no out-of-fold table"
same_losses undisturbed folds 0 1e-4 # one rank adds in another order than two
same_losses undisturbed folds 1 1e-4

echo "cancelled, and bad input"
job=$(submit cancelled --nodes=2 launch/slurm/train.sh launch.train "${settings[@]}" output="$here/cancelled")
await_steps "$job" cancelled 0
scancel "$job"
bad=$(submit bad --nodes=1 launch/slurm/train.sh launch.train "${settings[@]}" output="$here/bad" fold=7)
await_end "$job" CANCELLED
await_end "$bad" FAILED
[ "$(field "$bad" ExitCode)" = 2:0 ] || fail "bad input ended with $(field "$bad" ExitCode), not 2"
grep -q "error: fold=7" "$here/jobs/bad.out" || fail "bad input is not told"

echo "a search over both nodes"
job=$(submit sweep --nodes=2 launch/slurm/sweep.sh "${settings[@]}" train.epochs=1 space=tune/spaces/losses.yaml \
    search.trials=2 output="$here/sweep")
await_end "$job" COMPLETED
[ -s "$here/sweep/best.yaml" ] || fail "no best settings"

echo "all of that held"
