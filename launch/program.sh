#!/usr/bin/env bash
# Trains once, as a service or a container: exits with 75 where a preemption left more to do, so
# that what started it (systemd, JobSet) starts it again; leaves WORKDIR/finished at the end.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/program.sh PYTHON WORKDIR [FLAG OF mmmem_jax.main ...]

Runs `PYTHON -m mmmem_jax.main --workdir=WORKDIR FLAG...` and hands SIGTERM on to it, which saves
and exits. Exits with 75 where that left WORKDIR/preempted.json: the same command resumes. Otherwise
with the code of the program, after an empty file WORKDIR/finished where that is 0.
TEXT
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
esac
(($# >= 2)) || fail 'needs PYTHON and WORKDIR; see --help'
python=$1
workdir=$2
shift 2

begin_run "$python" "$workdir"
"$python" -m mmmem_jax.main --workdir="$workdir" "$@" &
child=$!
# A trap ends `wait` early, with a code of its own: then wait again.
signalled=yes
trap 'signalled=yes; kill -TERM "$child" 2>/dev/null || true' TERM
while [[ -n $signalled ]]; do
  signalled=''
  code=0
  wait "$child" || code=$?
done
((code == 0)) || exit "$code"
end_run "$python" "$workdir"
