#!/usr/bin/env bash
# The batch script of launch/slurm.sh: trains on all nodes, and queues itself again where a
# preemption or the time limit left more to do.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: sbatch --chdir=CLONE launch/slurm_job.sh PYTHON WORKDIR [FLAG OF mmmem_jax.main ...]

Runs `PYTHON -m mmmem_jax.main --workdir=WORKDIR FLAG...` once for each task; JAX finds its peers
from what Slurm tells each. Where that leaves WORKDIR/preempted.json, the job is queued again.
TEXT
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
esac
# Slurm runs a copy from elsewhere: the clone is the current folder.
# shellcheck source=launch/common.sh
source launch/common.sh
(($# >= 2)) || fail 'needs PYTHON and WORKDIR; see --help'
python=$1
workdir=$2
shift 2

trap : TERM # a preemption may tell the script too: what follows srun must still be done
begin_run "$python" "$workdir"
code=0
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  "$python" -m mmmem_jax.main --workdir="$workdir" "$@" || code=$?
((code)) || end_run "$python" "$workdir" || code=$?
# 143: SIGTERM came before there was a step to save.
((code == 75 || code == 143)) || exit "$code"
# Of a job that was cancelled, which gets SIGTERM too, Slurm says COMPLETING.
if [[ $(squeue --jobs="$SLURM_JOB_ID" --noheader --format=%T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
