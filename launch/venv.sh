# Sourced by launch/local.sh and test.sh: a virtual environment made once and kept.
# shellcheck shell=bash

fail() {
  printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2
  exit 2
}

# Prints the first Python among $PYTHON, python3.12, python3.11, python3 and python that will do.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys, ensurepip, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    if [[ $candidate == "${PYTHON:-}" ]]; then
      fail "PYTHON=$PYTHON is no Python 3.11 or 3.12 with the venv module"
    fi
  done
  fail 'needs Python 3.11 or 3.12 with the venv module on PATH, or PYTHON=/path/to/python'
}

# ensure_venv FOLDER CLONE PIP_ARGUMENT...: runs `pip install PIP_ARGUMENT...` in the environment,
# which is made where it is missing. A stamp of what the install depends on makes a rerun free.
ensure_venv() {
  local venv=$1 clone=$2 python key stamp=$1/.installed
  shift 2
  if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python)
    printf 'Making a virtual environment in %s\n' "$venv"
    "$python" -m venv "$venv"
  fi
  key=$(printf '%s\n' "$clone" && cat -- "$clone/pyproject.toml" "$clone/requirements.txt")
  if [[ ! -f $stamp || $(<"$stamp") != "$key" ]]; then
    printf 'Installing what mmmem_jax needs (a minute or two, once)\n'
    rm -f -- "$stamp"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$clone/requirements.txt" "$@"
    printf '%s\n' "$key" >"$stamp"
  fi
}
