#!/usr/bin/env bash
# Trains and evaluates on this machine, from a fresh clone.
set -euo pipefail
clone=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/venv.sh
source "$clone/launch/venv.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/local.sh [--config CONFIG] [--workdir DIR] [--venv DIR]

Makes a virtual environment, installs mmmem_jax from this clone with the versions that were tested,
trains (python -m mmmem_jax.main) and evaluates (python -m mmmem_jax.eval_main). Needs Python 3.11
or 3.12; PYTHON=/path/to/python chooses one (an environment of another version is made anew). Run
again, it resumes and installs nothing.

  --config CONFIG  config file of the clone, FILE or FILE:ARG (default configs/sib_grpo.py);
                   configs/sib_grpo.py:smoke does the whole way in a minute and a half
  --workdir DIR    folder of checkpoints, metrics and the report (default runs/NAME in the clone,
                   NAME being that of the config)
  --venv DIR       virtual environment to make or use (default .venv in the clone)
TEXT
}

absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

config=configs/sib_grpo.py
workdir=
venv=$clone/.venv
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --config=* | --workdir=* | --venv=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --config | --workdir | --venv)
      [[ -n ${2:-} ]] || fail "$1 needs a value; see --help"
      case $1 in
        --config) config=$2 ;;
        --workdir) workdir=$(absolute "$2") ;;
        --venv) venv=$(absolute "$2") ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
if [[ -z $workdir ]]; then
  name=$(basename -- "${config/.py/}")
  workdir=$clone/runs/${name//:/_}
fi

ensure_venv "$venv" "$clone" --editable "$clone"
cd -- "$clone"
options=()
if [[ $config == *sib_grpo* && -z ${XLA_FLAGS:-} && $(getconf _NPROCESSORS_ONLN) -ge 2 &&
  $("$venv/bin/python" -c 'import jax; print(jax.default_backend())') == cpu ]]; then
  # Two devices in the CPU share the streams of a batch: a third faster than one on two cores.
  export XLA_FLAGS=--xla_force_host_platform_device_count=2
  options+=(--config.mesh.data=2)
fi
"$venv/bin/python" -m mmmem_jax.main --config="$config" --workdir="$workdir" \
  ${options[@]+"${options[@]}"}
"$venv/bin/python" -m mmmem_jax.eval_main --workdir="$workdir"
