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

# Prints the version of an interpreter as 3.11; nothing where it does not run.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Makes the virtual environment where there is none, where pip does not run in it (making it was
# interrupted), and where $PYTHON names another version than it has.
make_venv() {
  local venv=$1 python='' clear=''
  [[ -z ${PYTHON:-} ]] || python=$(find_python)
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
    [[ -z $python || $(python_version "$python") == $(python_version "$venv/bin/python") ]]; then
    return
  fi
  python=${python:-$(find_python)}
  printf 'Making a virtual environment in %s\n' "$venv"
  [[ ! -f $venv/pyvenv.cfg ]] || clear=--clear # of nothing but an environment
  rm -f -- "$venv/.installed"
  "$python" -m venv ${clear:+"$clear"} "$venv"
}

# ensure_venv FOLDER CLONE PIP_ARGUMENT...: runs `pip install PIP_ARGUMENT...` in the environment,
# which is made where it is missing. A stamp of what the install depends on makes a rerun free: the
# arguments (without their folders, as test.sh installs from a new one each time) tell the extras.
ensure_venv() {
  local venv=$1 clone=$2 key stamp=$1/.installed
  shift 2
  make_venv "$venv"
  key=$(printf '%s\n' "$clone" "${@##*/}" &&
    cat -- "$clone/pyproject.toml" "$clone/requirements.txt")
  if [[ ! -f $stamp || $(<"$stamp") != "$key" ]]; then
    printf 'Installing what mmmem_jax needs (a minute or two, once)\n'
    rm -f -- "$stamp"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$clone/requirements.txt" "$@"
    printf '%s\n' "$key" >"$stamp"
  fi
}
