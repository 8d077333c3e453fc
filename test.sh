#!/usr/bin/env bash
# Lints, builds the wheel, and runs the tests against the installed wheel; sets itself up.
#   bash test.sh [PYTEST ARGUMENTS]     e.g. bash test.sh tests/flags_test.py -k help
# PYTHON=python3.11 chooses the interpreter, VENV=DIR the environment (default .venv-test), which is
# made anew where PYTHON names another version than it has. Without arguments, a second job compiles
# the programs for TPUs ahead of time, and a third compares Qwen3-VL with the public PyTorch
# implementation: where pip finds a build of PyTorch for CPUs (others take gigabytes), or PARITY=1.
set -euo pipefail
clone=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/venv.sh
source "$clone/launch/venv.sh"
venv=${VENV:-$clone/.venv-test}
[[ $venv == /* ]] || venv=$PWD/$venv
unset PYTHONPATH

# Built from a copy, the wheel holds no leftovers and the clone stays clean.
stage=$(mktemp -d)
trap 'rm -rf -- "$stage"' EXIT
mkdir -- "$stage/source" "$stage/elsewhere"
cd -- "$clone"
cp -R -- mmmem_jax LICENSE ./*.* "$stage/source"
find "$stage/source" -name __pycache__ -prune -exec rm -rf -- {} +

# Whether what PyTorch pip would install is a build for CPUs alone.
finds_torch_for_cpus() {
  local pin
  pin=$(grep '^torch==' "$clone/requirements.txt")
  "$venv/bin/python" -m pip install --dry-run --no-deps --ignore-installed --quiet \
    --disable-pip-version-check --report - "$pin" 2>/dev/null | grep -q '%2Bcpu'
}

extras=test,aot
make_venv "$venv"
if [[ ${PARITY:-} == 1 ]] || finds_torch_for_cpus; then
  extras+=,parity
fi
ensure_venv "$venv" "$clone" "$stage/source[$extras]"
python=$venv/bin/python

echo 'Linting'
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/shellcheck" --external-sources test.sh .ci/run launch/*.sh

echo 'Building and installing the wheel'
"$python" -m build --wheel --outdir "$stage/dist" "$stage/source" >"$stage/build.log" 2>&1 ||
  { cat -- "$stage/build.log" && fail 'the wheel does not build'; }
"$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
  "$stage"/dist/*.whl

# From another folder, which has all but the package, so that only the wheel can be imported.
for name in .ci benchmarks configs data launch notebooks tests test.sh ./*.*; do
  [[ ! -e $name ]] || cp -R -- "$name" "$stage/elsewhere"
done
if [[ -z ${MMMEM_EGOLIFE_DIR:-} && -d $clone/../shared/data/egolife ]]; then
  export MMMEM_EGOLIFE_DIR=$clone/../shared/data/egolife
fi
export MMMEM_ARTEFACTS=${MMMEM_ARTEFACTS:-$clone/.ci/artefacts} # screenshots of what was tested
mkdir -p -- "$MMMEM_ARTEFACTS"
export JAX_COMPILATION_CACHE_DIR=$venv/jax_cache # kept between runs
cd -- "$stage/elsewhere"
export MMMEM_TEST_INSTALLED=$stage/source/mmmem_jax
# What the tests of a file share is made once. Most programs run a few times, at toy size: to optimise
# them would take longer than it saves.
JAX_DISABLE_MOST_OPTIMIZATIONS=1 "$python" -m pytest --numprocesses 2 --dist loadfile \
  --no-loadscope-reorder "$@"
if ((!$#)); then
  echo 'Compiling ahead of time for TPUs'
  "$python" -m pytest --numprocesses 2 --dist loadfile -m aot
  if [[ $extras == *parity ]]; then
    echo 'Comparing with PyTorch'
    "$python" -m pytest --numprocesses 2 -m parity
  else
    echo 'No PyTorch for CPUs is at hand: not compared with it (PARITY=1 takes any)'
  fi
fi
