#!/usr/bin/env bash
# Trains on the GPU nodes of a Slurm cluster, one process for each GPU.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/slurm.sh COMMAND [FLAG...] [-- FLAG OF mmmem_jax.main ...]

  setup   makes a virtual environment and installs mmmem_jax from this clone, once
  submit  submits the training; nothing happens where a job of its name is queued or running. At
          the time limit and when preempted it saves, is queued again, and resumes
  tail    follows what it writes
  status  shows its job
  cancel  cancels it; nothing happens where there is none

  --name NAME          (or MMMEM_JOB) name of the job
  --nodes N            nodes (1)
  --gpus-per-node N    GPUs of each, which is also the number of processes on it (1)
  --cpus-per-task N    CPU cores of each process (the cluster's default)
  --time LIMIT         time limit, as sbatch takes it (the partition's default)
  --partition NAME     (or SBATCH_PARTITION) partition (the cluster's default)
  --account NAME       (or SBATCH_ACCOUNT) account (the user's default)
  --workdir DIR        (or MMMEM_WORKDIR) folder of checkpoints and metrics that all nodes see, or
                       gs://BUCKET/FOLDER (default runs/NAME in the clone)
  --config CONFIG      config file of the clone, FILE or FILE:ARG (configs/sib_grpo.py)
  --venv DIR           virtual environment, on a disk that all nodes see (.venv in the clone)
  --jax EXTRA          what jax is installed with: cuda12 or cuda13, by the driver (cuda12)
  --dry-run            prints every command instead of running it; needs no Slurm

Other options of sbatch come from its own variables: SBATCH_QOS, SBATCH_CONSTRAINT, ...
TEXT
}

name=${MMMEM_JOB:-} nodes=1 gpus_per_node=1 cpus_per_task='' time=''
partition=${SBATCH_PARTITION:-} account=${SBATCH_ACCOUNT:-} workdir=${MMMEM_WORKDIR:-}
config=configs/sib_grpo.py venv='' jax=cuda12 dry_run=''

check_name() {
  require "$name" --name MMMEM_JOB 'what the job is called'
  require_name "$name"
}

check_slurm() {
  check_name
  need "$1" 'log in to a node of the cluster, where Slurm is'
}

# Prints the number of the job of this name; nothing where there is none.
job() {
  squeue --me --name="$name" --noheader --format=%i
}

log_file() {
  printf '%s\n' "runs/logs/$name-%j.log"
}

setup() {
  [[ $jax == cuda12 || $jax == cuda13 ]] || fail "--jax=$jax must be cuda12 or cuda13"
  # shellcheck disable=SC2016 # "$@" is that of the inner bash
  run bash -euo pipefail -c 'source launch/venv.sh; ensure_venv "$@"' slurm.sh \
    "$venv" "$PWD" --editable "$PWD" "jax[$jax]" gcsfs
}

submit() {
  check_slurm sbatch
  local number value
  for value in "$nodes" "$gpus_per_node" "${cpus_per_task:-1}"; do
    [[ $value =~ ^[1-9][0-9]{0,4}$ ]] ||
      fail "--nodes, --gpus-per-node and --cpus-per-task are numbers from 1 on, not $value"
  done
  if [[ -n $dry_run ]]; then
    quote squeue --me --name="$name" --noheader --format=%i
    comment 'only where that finds none:'
  else
    [[ -x $venv/bin/python ]] || fail "no virtual environment in $venv: bash launch/slurm.sh setup"
    number=$(job)
    if [[ -n $number ]]; then
      printf '%s is queued or running already: job %s\n' "$name" "$number"
      return
    fi
  fi
  add_defaults "$config" "$workdir"
  run mkdir -p -- runs/logs
  # TERM goes to the processes of srun, not to the script: they save and end before the limit.
  run sbatch --job-name="$name" --chdir="$PWD" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
    --gpus-per-node="$gpus_per_node" ${cpus_per_task:+"--cpus-per-task=$cpus_per_task"} \
    ${time:+"--time=$time"} \
    ${partition:+"--partition=$partition"} ${account:+"--account=$account"} \
    --requeue --signal=TERM@300 --dependency=singleton --open-mode=append --output="$(log_file)" \
    launch/slurm_job.sh "$venv/bin/python" "$workdir" "${main_args[@]}"
}

status() {
  check_slurm squeue
  run squeue --me --name="$name" --long
}

tail_log() {
  check_slurm squeue
  local number=JOB
  if [[ -n $dry_run ]]; then
    quote squeue --me --name="$name" --noheader --format=%i
    comment 'the number it prints in place of JOB:'
  else
    number=$(job)
    [[ -n $number ]] || fail "no job $name is queued or running; its logs are in $PWD/runs/logs"
  fi
  run tail -n 200 -F "$(log_file | sed "s/%j/$number/")"
}

cancel() {
  check_slurm scancel
  run scancel --me --name="$name"
}

command=${1:-}
case $command in
  -h | --help | '')
    usage
    [[ -n $command ]] || exit 2
    exit
    ;;
  setup | submit | tail | status | cancel) ;;
  *) fail "unknown command $command; see --help" ;;
esac
valued='name nodes gpus-per-node cpus-per-task time partition account workdir config venv jax'
parse_flags "$valued" 'dry-run' "${@:2}"
absolute workdir
absolute venv
cd -- "$launch/.."
venv=${venv:-$PWD/.venv}
workdir=${workdir:-$PWD/runs/$name}
[[ -z $dry_run ]] || quote cd "$PWD"
case $command in
  tail) tail_log ;;
  *) "$command" ;;
esac
