#!/usr/bin/env bash
# Trains on a TPU VM or pod, through a queued resource that is created, watched and deleted here.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/tpu.sh COMMAND [FLAG...] [-- FLAG OF mmmem_jax.main ...]

  create  asks for the TPU; from its first boot on it installs mmmem_jax and trains. Nothing happens
          where it is there or waiting; one that failed or was taken away is asked for anew
  keep    creates it again whenever it is taken away, until the training has finished; then deletes
          it. Runs until then: stop it with Ctrl-C, start it again at any time
  setup   installs mmmem_jax on all workers
  run     the same, and trains with the flags given now; nothing happens where it does already
  tail    follows what a worker writes
  status  says in what state it is, and why where it failed
  delete  gives it back; nothing happens where there is none

  --project ID             (or PROJECT_ID) project
  --zone ZONE              (or ZONE) zone, such as one of `gcloud compute tpus locations list`
  --name NAME              (or TPU_NAME) name of the queued resource and of its TPU
  --accelerator-type TYPE  (or ACCELERATOR_TYPE) such as v5litepod-16, v5p-128 or v6e-8
  --runtime-version NAME   (or RUNTIME_VERSION) its image (default: the one for v4 to v6e)
  --spot                   cheaper, and may be taken away at any time: see keep
  --autocheckpoint         a maintenance waits until the training has saved (needs gcloud alpha)
  --service-account EMAIL  (or SERVICE_ACCOUNT) what the TPU runs as, with access to the bucket
  --workdir gs://...       (or MMMEM_WORKDIR) folder of checkpoints and metrics
  --config CONFIG          config file of the repository, FILE or FILE:ARG (configs/sib_grpo.py)
  --repo URL               (or MMMEM_REPO) git repository the workers fetch, without credentials
                           (default: origin of this clone)
  --ref REF                (or MMMEM_REF) its commit, branch or tag (default: the commit of this
                           clone, which must have been pushed)
  --worker N               of which worker tail shows the log (0)
  --poll SECONDS           how often keep looks (60)
  --dry-run                prints every command instead of running it; needs neither gcloud nor net

Whether a model fits is known before, on any computer:
  python -m mmmem_jax.main --compile_only --topology=v5p:8x8x4 --config=configs/sib_grpo.py
TEXT
}

project=${PROJECT_ID:-} zone=${ZONE:-} name=${TPU_NAME:-}
accelerator_type=${ACCELERATOR_TYPE:-} runtime_version=${RUNTIME_VERSION:-}
service_account=${SERVICE_ACCOUNT:-} workdir=${MMMEM_WORKDIR:-} config=configs/sib_grpo.py
repo=${MMMEM_REPO:-} ref=${MMMEM_REF:-} spot='' autocheckpoint='' worker=0 poll=60 dry_run=''

check_place() {
  require "$project" --project PROJECT_ID 'the Google Cloud project'
  require "$zone" --zone ZONE 'where the TPU is'
  require "$name" --name TPU_NAME 'what the TPU is called'
  require_name "$name"
  need gcloud 'install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install'
}

# Where the workers get the code: a commit they can fetch by themselves, at every boot.
check_code() {
  if [[ -z $repo ]]; then
    repo=$(git remote get-url origin 2>/dev/null) ||
      fail '--repo is missing: this clone has no origin; give --repo URL or set MMMEM_REPO'
  fi
  case $repo in
    https://*@*) fail '--repo holds credentials, which everyone who reads the metadata would see' ;;
    https://*) ;;
    *) fail "--repo=$repo: the workers have no key, give https://..." ;;
  esac
  [[ $ref != -* ]] || fail "--ref=$ref: a commit, branch or tag begins with no -"
  [[ -n $ref ]] && return
  ref=$(git rev-parse --verify --quiet 'HEAD^{commit}') ||
    fail '--ref is missing: this is no git clone; give --ref COMMIT or set MMMEM_REF'
  [[ -n $(git branch --remotes --contains "$ref") ]] ||
    fail "commit ${ref:0:12} has not been pushed: push it, or give --ref"
  if [[ -n $(git status --porcelain --untracked-files=no) ]]; then
    printf 'tpu.sh: note: the changes that are not committed stay here\n' >&2
  fi
}

check_accelerator() {
  require "$accelerator_type" --accelerator-type ACCELERATOR_TYPE 'which TPU, such as v5litepod-16'
  [[ -z $runtime_version ]] || return 0
  # https://cloud.google.com/tpu/docs/runtimes
  case $accelerator_type in
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
    *) fail "no image is known for $accelerator_type: give --runtime-version" ;;
  esac
}

check_program() {
  require_bucket "$workdir"
  check_code
  local value
  for value in "$repo" "$ref" "$workdir" "$config" ${main_args[@]+"${main_args[@]}"}; do
    [[ $value != *'||'* && $value != *$'\n'* ]] ||
      fail "no value may hold || or a line break: $value"
  done
  add_defaults "$config" "$workdir"
}

# tpus GROUP VERB ARGUMENT...: a gcloud command about this TPU.
tpus() {
  run gcloud compute tpus "$@" --project="$project" --zone="$zone"
}

# Adds what is usually to be done to an error of gcloud on stdin.
explain() {
  local text
  text=$(cat)
  printf '%s\n' "$text" >&2
  case $text in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      fail "the quota of $project in $zone is too small: ask for more of tpu.googleapis.com (spot \
has its own) at https://console.cloud.google.com/iam-admin/quotas"
      ;;
    *SERVICE_DISABLED* | *'has not been used in project'*)
      fail "the Cloud TPU API is off: gcloud services enable tpu.googleapis.com --project=$project"
      ;;
    *PERMISSION_DENIED* | *'does not have permission'*)
      fail "no right to use TPUs in $project: gcloud auth login, or ask for roles/tpu.admin"
      ;;
    *'gcloud auth login'*) fail 'not logged in: gcloud auth login' ;;
    *'gcloud components install'*) fail '--autocheckpoint needs: gcloud components install alpha' ;;
    *) fail 'gcloud failed, see above' ;;
  esac
}

describe() {
  tpus queued-resources describe "$name" --format="value($1)"
}

# Sets the variable state: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE where there is none.
get_state() {
  local output
  if output=$(describe state.state 2>&1); then
    state=${output##*$'\n'}
  elif [[ $output == *NOT_FOUND* ]]; then
    state=NONE
  else
    explain <<<"$output"
  fi
}

require_active() {
  if [[ -n $dry_run ]]; then
    describe state.state
    comment 'only where it is ACTIVE:'
    return
  fi
  get_state
  [[ $state == ACTIVE ]] || fail "$name is $state, not ACTIVE: bash launch/tpu.sh create, or wait"
}

request() {
  local output asking=(gcloud ${autocheckpoint:+alpha} compute tpus queued-resources create "$name"
    --node-id="$name" --project="$project" --zone="$zone"
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version"
    ${spot:+--spot} ${autocheckpoint:+--autocheckpoint-enabled}
    ${service_account:+"--service-account=$service_account"}
    --scopes=https://www.googleapis.com/auth/cloud-platform
    --metadata-from-file=startup-script=launch/tpu_startup.sh
    # Parted by ||, as a value may hold commas: gcloud topic escaping.
    --metadata="^||^mmmem-repo=$repo||mmmem-ref=$ref||mmmem-workdir=$workdir||mmmem-args=$(
      printf '%s\n' "${main_args[@]}"
    )" --async)
  if [[ -n $dry_run ]]; then
    quote "${asking[@]}"
  elif output=$("${asking[@]}" 2>&1); then
    printf '%s\n' "$output"
  else
    explain <<<"$output"
  fi
}

remove() {
  tpus queued-resources delete "$name" --force --quiet
}

why_failed() {
  describe state.failedData.error.message
}

create() {
  check_place
  check_accelerator
  check_program
  if [[ -n $dry_run ]]; then
    describe state.state
    comment 'only where it is FAILED or SUSPENDED:'
    remove
    comment 'only where there was none, of an earlier run:'
    quote gcloud storage rm "${workdir%/}/finished"
    comment 'only where there is none (any more):'
    request
    return
  fi
  get_state
  case $state in
    NONE) ;;
    FAILED | SUSPENDED)
      printf '%s is %s; it is asked for anew. %s\n' "$name" "$state" "$(why_failed)"
      remove
      ;;
    SUSPENDING | DELETING)
      printf '%s is %s; in some minutes it can be created again\n' "$name" "$state"
      return
      ;;
    *)
      printf '%s is there already: %s\n' "$name" "$state"
      return
      ;;
  esac
  [[ $state != NONE ]] || gcloud storage rm "${workdir%/}/finished" >/dev/null 2>&1 || true
  request
  printf 'Asked for %s. See: bash launch/tpu.sh status, tail\n' "$name"
}

keep() {
  local finished=${workdir%/}/finished
  [[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll is no number of seconds"
  if [[ -n $dry_run ]]; then
    create
    comment "every $poll seconds the above, until this finds the file:"
    quote gcloud storage ls "$finished"
    comment 'then:'
    remove
    return
  fi
  create # fails at once where something is missing
  local said='' message
  until gcloud storage ls "$finished" >/dev/null 2>&1; do
    sleep "$poll"
    set +e # the net may fail for a while
    message=$(set -e && create)
    set -e
    [[ $message == "$said" ]] || printf '%s %s\n' "$(date +%T)" "$message"
    said=$message
  done
  echo 'The training has finished'
  delete
}

remote_command() {
  quote sudo bash mmmem_startup.sh "$@"
}

# at_workers VERB ARGUMENT...: runs launch/tpu_startup.sh VERB ARGUMENT... on all workers.
at_workers() {
  check_place
  check_program
  require_active
  tpus tpu-vm scp launch/tpu_startup.sh "$name:mmmem_startup.sh" --worker=all
  if [[ $1 == setup ]]; then
    tpus tpu-vm ssh "$name" --worker=all --command="$(remote_command setup "$repo" "$ref")"
  else
    tpus tpu-vm ssh "$name" --worker=all \
      --command="$(remote_command run "$repo" "$ref" "$workdir" "${main_args[@]}")"
  fi
}

tail_log() {
  check_place
  [[ $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker is no number of a worker"
  require_active
  tpus tpu-vm ssh "$name" --worker="$worker" \
    --command='sudo tail --lines=200 --follow=name --retry /var/lib/mmmem/log'
}

status() {
  check_place
  if [[ -n $dry_run ]]; then
    describe state.state
    comment 'only where it FAILED:'
    why_failed
    return
  fi
  get_state
  printf '%s\n' "$state"
  [[ $state != FAILED ]] || why_failed
}

delete() {
  check_place
  if [[ -z $dry_run ]]; then
    get_state
    case $state in
      NONE | DELETING)
        printf '%s is not there (any more)\n' "$name"
        return
        ;;
    esac
  fi
  remove
}

command=${1:-}
case $command in
  -h | --help | '')
    usage
    [[ -n $command ]] || exit 2
    exit
    ;;
  create | keep | setup | run | tail | status | delete) ;;
  *) fail "unknown command $command; see --help" ;;
esac
valued='project zone name accelerator-type runtime-version service-account'
valued+=' workdir config repo ref worker poll'
parse_flags "$valued" 'spot autocheckpoint dry-run' "${@:2}"
cd -- "$launch/.."
[[ -z $dry_run ]] || quote cd "$PWD"
case $command in
  setup | run) at_workers "$command" ;;
  tail) tail_log ;;
  *) "$command" ;;
esac
