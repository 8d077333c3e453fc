#!/usr/bin/env bash
# On a TPU VM, as root: installs mmmem_jax and keeps the training running, from every boot on.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash tpu_startup.sh                                  as the start-up script, at every boot
       bash tpu_startup.sh setup REPO REF                   fetches and installs, no more
       bash tpu_startup.sh run REPO REF WORKDIR [FLAG...]   the same, and (re)starts the training

As the start-up script it does what the last `run` on this machine said, or else what the instance
metadata say (mmmem-repo, mmmem-ref, mmmem-workdir, and mmmem-args with a flag on each line), which
launch/tpu.sh create puts there. The training is the systemd service mmmem: it is started again
after a failure, a preemption that left the machine, and a reboot, and resumes from WORKDIR.
Everything is in /var/lib/mmmem: code, venv, log.
TEXT
}

home=${MMMEM_HOME:-/var/lib/mmmem}
unit=${MMMEM_UNIT:-/etc/systemd/system/mmmem.service}
export HOME=${HOME:-/root} DEBIAN_FRONTEND=noninteractive

attribute() {
  curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Ubuntu's own updates hold the lock for a while after boot.
apt_get() {
  apt-get --option DPkg::Lock::Timeout=600 --quiet --yes "$@"
}

# The images bring an older Python than 3.11.
install_python() {
  python3.12 -c 'import ensurepip, venv' >/dev/null 2>&1 && return
  apt_get update
  if ! apt-cache show python3.12-venv >/dev/null 2>&1; then
    add-apt-repository --yes ppa:deadsnakes/ppa
    apt_get update
  fi
  apt_get install python3.12-venv
}

# Exactly the commit (or branch, or tag) that was asked for, in $home/code.
fetch_code() {
  local repo=$1 ref=$2
  git init --quiet -- "$home/code"
  cd -- "$home/code"
  git fetch --quiet --depth 1 --no-tags -- "$repo" "$ref"
  git checkout --quiet --force --detach FETCH_HEAD
}

setup() {
  printf 'Installing %s of %s\n' "$2" "$1"
  install_python
  fetch_code "$1" "$2"
  # shellcheck source=launch/venv.sh
  (source launch/venv.sh && ensure_venv "$home/venv" "$home/code" \
    --editable "$home/code" 'jax[tpu]' gcsfs)
}

write_unit() {
  cat >"$unit" <<TEXT
[Unit]
Description=MM-Mem training
# Bad flags fail at once, ten times, and that is the end of it; waiting for a worker that is late
# (5 minutes, then again) goes on.
StartLimitIntervalSec=1800
StartLimitBurst=10

[Service]
WorkingDirectory=$home/code
ExecStart=/bin/bash $home/program
Restart=on-failure
RestartSec=30
# Only bash is told to stop, and tells the program, which needs time to save.
KillMode=mixed
TimeoutStopSec=300
StandardOutput=append:$home/log
StandardError=inherit
TEXT
  systemctl daemon-reload
}

# What the service runs, $home/program, is the settings that a reboot finds again.
start() {
  local new=$home/program.new
  {
    printf 'exec bash %q' "$home/code/launch/program.sh"
    printf ' %q' "$home/venv/bin/python" "$@"
    printf '\n'
  } >"$new"
  if cmp --quiet -- "$new" "$home/program" && systemctl is-active --quiet mmmem; then
    rm -- "$new"
    echo 'The training is running'
    return
  fi
  systemctl stop mmmem >/dev/null 2>&1 || true # saves
  mv -- "$new" "$home/program"
  write_unit
  systemctl reset-failed mmmem >/dev/null 2>&1 || true
  systemctl start mmmem
  echo 'The training has been started'
}

boot() {
  local repo ref workdir args flags
  if [[ -e $home/program ]]; then
    systemctl start mmmem
    return
  fi
  repo=$(attribute mmmem-repo)
  ref=$(attribute mmmem-ref)
  workdir=$(attribute mmmem-workdir)
  args=$(attribute mmmem-args)
  mapfile -t flags <<<"$args"
  setup "$repo" "$ref"
  start "$workdir" "${flags[@]}"
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
esac
mkdir -p -- "$home"
exec > >(tee -a -- "$home/log") 2>&1
exec 9>"$home/lock" # `run` by hand waits until the start-up script is through
flock 9
case ${1:-boot}:$# in
  boot:0) boot ;;
  setup:3) setup "$2" "$3" ;;
  run:[4-9] | run:[1-9][0-9]*)
    setup "$2" "$3"
    start "${@:4}"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
