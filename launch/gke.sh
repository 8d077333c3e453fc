#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet that Kueue may queue.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/gke.sh COMMAND [FLAG...] [-- FLAG OF mmmem_jax.main ...]

  image   builds launch/Dockerfile from the last commit of this clone and pushes it
  render  prints the manifest
  apply   applies it: it trains as soon as there is room, and again after a preemption. Nothing
          happens where it is there already
  tail    follows what the first worker writes
  status  shows the JobSet and its pods
  delete  deletes it; nothing happens where there is none

  --name NAME             (or JOBSET_NAME) name of the JobSet
  --image IMAGE           (or IMAGE) REGISTRY/NAME:TAG
  --accelerator TYPE      (or TPU_ACCELERATOR) tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
                          or another cloud.google.com/gke-tpu-accelerator of the nodes
  --topology AxB[xC]      (or TPU_TOPOLOGY) of the slice, such as 4x4 or 4x4x8
  --chips-per-host N      chips of a node (4, or all where the slice has fewer)
  --queue NAME            (or KUEUE_QUEUE) LocalQueue of Kueue that admits it (default: none)
  --spot                  on spot nodes
  --max-restarts N        after failures that are no preemption (10)
  --service-account NAME  (or KUBE_SERVICE_ACCOUNT) what the pods run as, with access to the bucket
  --namespace NAME        (or KUBE_NAMESPACE) its namespace (default)
  --context NAME          (or KUBE_CONTEXT) cluster, of `kubectl config get-contexts` (the current)
  --workdir gs://...      (or MMMEM_WORKDIR) folder of checkpoints and metrics
  --config CONFIG         config file in the image, FILE or FILE:ARG (configs/sib_grpo.py)
  --dry-run               prints every command instead of running it; needs no kubectl

Whether a model fits is known before, on any computer:
  python -m mmmem_jax.main --compile_only --topology=v5p:8x8x4 --config=configs/sib_grpo.py
TEXT
}

name=${JOBSET_NAME:-} image=${IMAGE:-} accelerator=${TPU_ACCELERATOR:-} topology=${TPU_TOPOLOGY:-}
chips_per_host='' queue=${KUEUE_QUEUE:-} spot='' max_restarts=10
service_account=${KUBE_SERVICE_ACCOUNT:-} namespace=${KUBE_NAMESPACE:-default}
context=${KUBE_CONTEXT:-} workdir=${MMMEM_WORKDIR:-} config=configs/sib_grpo.py dry_run=''

check_name() {
  require "$name" --name JOBSET_NAME 'what the JobSet is called'
  require_name "$name"
  need kubectl 'install it, https://kubernetes.io/docs/tasks/tools/'
}

check_image() {
  require "$image" --image IMAGE 'the container image, such as REGISTRY/mmmem_jax:TAG'
}

# Sets chips_per_host and hosts.
check_slice() {
  require "$accelerator" --accelerator TPU_ACCELERATOR 'the kind of TPU, such as tpu-v5p-slice'
  require "$topology" --topology TPU_TOPOLOGY 'the shape of the slice, such as 4x4x4'
  [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
    fail "--topology=$topology must be such as 4x4 or 4x4x8"
  local chips=$((${topology//x/ * }))
  [[ -n $chips_per_host ]] || chips_per_host=$((chips < 4 ? chips : 4))
  if ! [[ $chips_per_host =~ ^[1-9][0-9]?$ ]] || ((chips % chips_per_host)); then
    fail "--chips-per-host=$chips_per_host must divide the $chips chips of $topology"
  fi
  [[ $max_restarts =~ ^[0-9]{1,6}$ ]] || fail "--max-restarts=$max_restarts is no number"
  hosts=$((chips / chips_per_host))
}

# A string as YAML (and JSON) quotes it.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "$text"
}

# The same, of an argument: Kubernetes replaces $(NAME) in those, and $$ by $.
yaml_argument() {
  yaml "${1//\$/\$\$}"
}

# The JobSet makes the headless service by which the hosts of a slice find each other; GKE tells
# each its place (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES), which is all that JAX needs.
manifest() {
  check_image
  check_slice
  require_bucket "$workdir"
  local argument values="$namespace$queue$image$accelerator$service_account$workdir$config"
  [[ $values${main_args[*]-} != *[[:cntrl:]]* ]] ||
    fail 'no value may hold a line break or another control character'
  add_defaults "$config" "$workdir"
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "$name")
  namespace: $(yaml "$namespace")
YAML
  [[ -z $queue ]] || cat <<YAML
  labels:
    kueue.x-k8s.io/queue-name: $(yaml "$queue")
YAML
  cat <<YAML
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      # All hosts start again and resume; what is no fault of the program is not counted.
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # the node was taken away
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
              - action: FailJob # launch/program.sh: preempted and saved
                onExitCodes:
                  containerName: main
                  operator: In
                  values: [75]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
YAML
  [[ -z $service_account ]] ||
    printf '              serviceAccountName: %s\n' "$(yaml "$service_account")"
  cat <<YAML
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
                cloud.google.com/gke-tpu-topology: $(yaml "$topology")
YAML
  [[ -z $spot ]] || cat <<'YAML'
                cloud.google.com/gke-spot: "true"
YAML
  cat <<YAML
              tolerations:
                - key: google.com/tpu
                  operator: Exists
YAML
  [[ -z $spot ]] || cat <<'YAML'
                - key: cloud.google.com/gke-spot
                  operator: Exists
YAML
  cat <<YAML
              containers:
                - name: main
                  image: $(yaml "$image")
                  command: [bash, launch/program.sh]
                  args:
                    - python
                    - $(yaml_argument "$workdir")
YAML
  for argument in "${main_args[@]}"; do
    printf '                    - %s\n' "$(yaml_argument "$argument")"
  done
  # A pod of an indexed Job, it would otherwise look for others.
  ((hosts > 1)) || cat <<'YAML'
                  env:
                    - name: JAX_NUM_PROCESSES
                      value: "1"
YAML
  cat <<YAML
                  resources:
                    requests:
                      google.com/tpu: $chips_per_host
                    limits:
                      google.com/tpu: $chips_per_host
YAML
}

kube() {
  run kubectl ${context:+"--context=$context"} --namespace="$namespace" "$@"
}

# Fails where the cluster lacks what the manifest needs.
check_cluster() {
  local error
  if ! error=$(kube get jobsets.jobset.x-k8s.io "$name" --ignore-not-found --output=name 2>&1); then
    printf '%s\n' "$error" >&2
    [[ $error != *"doesn't have a resource type"* ]] ||
      fail 'the cluster has no JobSet: https://jobset.sigs.k8s.io/docs/installation/'
    fail 'the cluster does not answer: gcloud container clusters get-credentials, or --context'
  fi
  [[ -n $queue ]] || return 0
  if ! error=$(kube get localqueues.kueue.x-k8s.io "$queue" --output=name 2>&1); then
    printf '%s\n' "$error" >&2
    fail "no Kueue queue $queue in $namespace: see kubectl get localqueues, or leave out --queue"
  fi
}

apply() {
  check_name
  local text error
  text=$(manifest)
  if [[ -n $dry_run ]]; then
    kube get jobsets.jobset.x-k8s.io "$name" --ignore-not-found --output=name
    [[ -z $queue ]] || kube get localqueues.kueue.x-k8s.io "$queue" --output=name
    printf "%s <<'YAML'\n%s\nYAML\n" "$(kube apply --filename=-)" "$text"
    return
  fi
  check_cluster
  error=$(kube apply --filename=- 2>&1 <<<"$text") || {
    printf '%s\n' "$error" >&2
    [[ $error != *immutable* ]] ||
      fail "$name is there with other settings: bash launch/gke.sh delete, then apply; it resumes"
    fail 'kubectl failed, see above'
  }
  printf '%s\n' "$error"
}

render() {
  require "$name" --name JOBSET_NAME 'what the JobSet is called'
  require_name "$name"
  manifest
}

build_image() {
  check_image
  need docker 'install it, https://docs.docker.com/engine/install/'
  # shellcheck disable=SC2016 # $1 is that of the inner bash
  run bash -o pipefail -c 'git archive HEAD | docker build --file launch/Dockerfile --tag "$1" -' \
    bash "$image"
  run docker push "$image"
}

status() {
  check_name
  kube get jobset "$name"
  kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

tail_log() {
  check_name
  kube logs --follow --tail=200 --selector="jobset.sigs.k8s.io/jobset-name=$name,\
batch.kubernetes.io/job-completion-index=0"
}

delete() {
  check_name
  kube delete jobset "$name" --ignore-not-found
}

command=${1:-}
case $command in
  -h | --help | '')
    usage
    [[ -n $command ]] || exit 2
    exit
    ;;
  image | render | apply | tail | status | delete) ;;
  *) fail "unknown command $command; see --help" ;;
esac
valued='name image accelerator topology chips-per-host queue max-restarts'
valued+=' service-account namespace context workdir config'
parse_flags "$valued" 'spot dry-run' "${@:2}"
cd -- "$launch/.."
case $command in
  image)
    [[ -z $dry_run ]] || quote cd "$PWD"
    build_image
    ;;
  tail) tail_log ;;
  *) "$command" ;;
esac
