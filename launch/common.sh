# Sourced by the launch scripts: flags, commands that --dry-run prints, one-line failures.
# shellcheck shell=bash
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/venv.sh
source "$launch/venv.sh"

# Prints words as a shell reads them back: a command to run here or on another machine.
quote() {
  local word separator=''
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word=\'${word//\'/\'\\\'\'}\' ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
  printf '\n'
}

# Runs a command; --dry-run prints it.
run() {
  if [[ -n ${dry_run:-} ]]; then quote "$@"; else "$@"; fi
}

# Says what follows in a dry run.
comment() {
  [[ -z ${dry_run:-} ]] || printf '# %s\n' "$1"
}

# need COMMAND HOW: fails where a command is missing. A dry run needs none.
need() {
  [[ -n ${dry_run:-} ]] || command -v "$1" >/dev/null || fail "$1 is not on PATH: $2"
}

# require VALUE FLAG ENV WHAT: fails where a setting is missing.
require() {
  [[ -n $1 ]] || fail "$2 is missing: $4; give $2 or set $3"
}

# A name that clouds and Kubernetes take: 1 to 40 of a-z, 0-9 and -, a letter first.
require_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$1: a name has 1 to 40 of a-z, 0-9 and -, a letter first, no - at the end"
}

unknown_flag() {
  fail "unknown flag $1; see --help (flags of mmmem_jax.main come after --)"
}

# parse_flags "VALUED..." "SWITCHES..." ARGUMENT...: --some-flag VALUE (or =VALUE) sets the variable
# some_flag, --some-switch sets some_switch to yes, what follows -- is put in the array main_args.
parse_flags() {
  local valued=" $1 " switches=" $2 " flag
  shift 2
  main_args=()
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --)
        main_args=("${@:2}")
        break
        ;;
      --[a-z]*=*) [[ $valued == *" $flag "* ]] || unknown_flag "--$flag" ;;
      --[a-z]*)
        if [[ $switches == *" $flag "* ]]; then
          printf -v "${flag//-/_}" yes
          shift
          continue
        fi
        [[ $valued == *" $flag "* ]] || unknown_flag "--$flag"
        [[ ${2:-} != --* ]] || fail "$1 needs a value; see --help"
        set -- "$1=${2:-}" "${@:3}"
        ;;
      *) unknown_flag "$1" ;;
    esac
    [[ -n ${1#*=} ]] || fail "--$flag needs a value; see --help"
    printf -v "${flag//-/_}" '%s' "${1#*=}"
    shift
  done
  for flag in ${main_args[@]+"${main_args[@]}"}; do
    case $flag in
      *$'\n'*) fail 'no flag after -- may hold a line break' ;;
      --workdir | --workdir=* | --config | --config=*)
        fail "give ${flag%%=*} before --, not after"
        ;;
    esac
  done
}

# add_defaults CONFIG WORKDIR: main_args begins with --config, a mesh of all devices, and a
# compilation cache that outlives the machine, where it names none.
add_defaults() {
  local flag mesh=--config.mesh.data=-1 cache=--compilation_cache=${2%/}/compiled
  for flag in ${main_args[@]+"${main_args[@]}"}; do
    case $flag in
      --config.mesh.data*) mesh='' ;;
      --compilation_cache*) cache='' ;;
    esac
  done
  main_args=("--config=$1" ${mesh:+"$mesh"} ${cache:+"$cache"}
    ${main_args[@]+"${main_args[@]}"})
}

# absolute VARIABLE: makes the folder it names independent of where the script runs.
absolute() {
  case ${!1} in
    '' | /* | gs://*) ;;
    *) printf -v "$1" '%s' "$PWD/${!1}" ;;
  esac
}

# Accelerators come and go, a bucket stays; and every host of a slice must see the same folder.
require_bucket() {
  require "$1" --workdir MMMEM_WORKDIR 'a folder in a bucket, gs://BUCKET/FOLDER'
  [[ $1 == gs://?*/?* ]] ||
    fail "--workdir=$1 must be a folder in a bucket, gs://BUCKET/FOLDER: disks go with the machine"
  [[ $1 != *[]*?[#]* ]] || fail "--workdir=$1 may hold none of * ? [ ] #, patterns to gcloud"
}

# begin_run PYTHON WORKDIR, before training: the mark of an earlier end goes.
begin_run() {
  "$1" - "$2" <<'PYTHON'
import sys
from etils import epath
(epath.Path(sys.argv[1]) / "finished").unlink(missing_ok=True)
PYTHON
}

# end_run PYTHON WORKDIR, after training: returns 75 where a preemption left more to do; otherwise
# leaves WORKDIR/finished, which launch/tpu.sh keep waits for. The processes of a run end together,
# after the first has written what it had to.
end_run() {
  "$1" - "$2" <<'PYTHON'
import sys
from etils import epath
workdir = epath.Path(sys.argv[1])
if (workdir / "preempted.json").exists():
    print("Preempted and saved: the same command resumes")
    sys.exit(75)
(workdir / "finished").write_text("")
PYTHON
}
