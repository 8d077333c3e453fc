"""launch/gke.sh: the manifest as YAML readers and Kubernetes see it, and a stand-in of kubectl."""

import re

import pytest
import yaml

NAME = ["--name=n"]
JOB = [*NAME, "--image=r/i:1", "--accelerator=tpu-v6e-slice", "--workdir=gs://b/run"]
SLICE = [*JOB, "--topology=4x8"]


def _manifest(machine, *args):
    done = machine.launch("gke.sh", "render", *args)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def _job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def _pod(manifest):
    return _job(manifest)["template"]["spec"]


def _expanded(argument):
    """What Kubernetes makes of an argument of a container that has no variable of its own.

    `$$` is `$`, `$(NAME)` of an unknown name stays: kubernetes.io/docs, "Use environment variables
    to define arguments".
    """
    return re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else m[0], argument)


@pytest.mark.parametrize(
    ("topology", "more", "hosts", "chips"),
    [
        ("1x1", [], 1, 1),
        ("2x2", [], 1, 4),
        ("2x4", [], 2, 4),
        ("2x4", ["--chips-per-host=8"], 1, 8),
        ("16x16", [], 64, 4),
        ("8x8x4", [], 64, 4),
    ],
)
def test_one_pod_for_each_host_of_the_slice(machine, topology, more, hosts, chips):
    manifest = _manifest(machine, *JOB, f"--topology={topology}", *more)
    job, pod = _job(manifest), _pod(manifest)
    assert (job["completions"], job["parallelism"]) == (hosts, hosts)
    assert job["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    alone = [{"name": "JAX_NUM_PROCESSES", "value": "1"}]
    assert container.get("env") == (alone if hosts == 1 else None)
    mesh, cache = "--config.mesh.data=-1", "--compilation_cache=gs://b/run/compiled"
    assert container["args"][-3:] == ["--config=configs/sib_grpo.py", mesh, cache]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": topology,
    }


@pytest.mark.parametrize(
    "args", [["--topology=4"], ["--topology=4x4x4x4"], ["--topology=3x3"], ["--topology=0x4"]]
)
def test_refuses_a_slice_that_cannot_be(machine, args):
    done = machine.launch("gke.sh", "render", *JOB, *args)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert args[0].partition("=")[2] in line


def test_a_preemption_starts_all_again_and_is_not_counted(machine):
    manifest = _manifest(machine, *SLICE, "--max-restarts=3")
    policy, job = manifest["spec"]["failurePolicy"], _job(manifest)
    assert policy["maxRestarts"] == 3
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0
    disruption, exit_code = job["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (container,) = _pod(manifest)["containers"]
    assert exit_code["onExitCodes"]["containerName"] == container["name"]
    assert exit_code["onExitCodes"]["values"] == [75]
    assert {disruption["action"], exit_code["action"]} == {"FailJob"}
    assert _pod(manifest)["restartPolicy"] == "Never"
    assert _pod(manifest)["terminationGracePeriodSeconds"] >= 300


def test_kueue_and_spot_and_service_account_are_asked_for(machine):
    plain = _manifest(machine, *SLICE)
    assert "labels" not in plain["metadata"]
    assert "serviceAccountName" not in _pod(plain)
    manifest = _manifest(machine, *SLICE, "--queue=q", "--spot", "--service-account=sa")
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert _pod(manifest)["serviceAccountName"] == "sa"
    assert _pod(manifest)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [t["key"] for t in _pod(manifest)["tolerations"]]
    assert _pod(manifest)["tolerations"][0] == _pod(plain)["tolerations"][0]


HOSTILE = [
    "--config.a=$(HOME) $$ $x `y`",
    "--config.b=\"q\" 's' \\n \\",
    "--config.c=: # - {a: b} [c] & * ! | > % @",
    "--config.d=",
    "--config.e=é ∞",
    "true",
]


def test_the_container_gets_every_argument_to_the_letter(machine):
    workdir = 'gs://b/it\'s: "$(x)" - no'
    flags = ["--config.mesh.data=8", "--compilation_cache=/tmp/x", *HOSTILE]
    manifest = _manifest(machine, *SLICE, f"--workdir={workdir}", "--", *flags)
    (container,) = _pod(manifest)["containers"]
    assert container["command"] == ["bash", "launch/program.sh"]
    args = [_expanded(argument) for argument in container["args"]]
    assert args == ["python", workdir, "--config=configs/sib_grpo.py", *flags]


@pytest.mark.parametrize("flag", ["--image=a\nb", "--queue=a\tb", "--namespace=\x1b"])
def test_a_value_cannot_break_out_of_the_manifest(machine, flag):
    done = machine.launch("gke.sh", "render", *SLICE, flag)
    assert done.returncode == 2
    assert "control character" in done.stderr


# $STATE/jobset is the manifest of the one that is there.
KUBECTL = """
case "$*" in
  *'get jobsets.'*) [[ ! -e $STATE/no-jobset ]] || { cat "$STATE/no-jobset" >&2; exit 1; } ;;
  *'get localqueues.'*) [[ ! -e $STATE/no-queue ]] || { echo NotFound >&2; exit 1; } ;;
  *apply*)
    cat > "$STATE/new"
    if [[ ! -e $STATE/jobset ]]; then mv "$STATE/new" "$STATE/jobset"; echo created
    elif cmp -s "$STATE/new" "$STATE/jobset"; then echo unchanged
    else echo 'spec.replicatedJobs: Invalid value: field is immutable' >&2; exit 1; fi ;;
  *delete*) rm -f "$STATE/jobset" ;;
esac
"""


@pytest.fixture
def cluster(machine):
    machine.command("kubectl", KUBECTL)
    return machine


def test_apply_and_delete_twice_is_once(cluster):
    done = [cluster.launch("gke.sh", "apply", *SLICE, "--queue=q") for _ in range(2)]
    assert [(d.returncode, d.stdout) for d in done] == [(0, "created\n"), (0, "unchanged\n")]
    applied = yaml.safe_load((cluster.state / "jobset").read_text())
    assert applied == _manifest(cluster, *SLICE, "--queue=q")
    for _ in range(2):
        assert cluster.launch("gke.sh", "delete", *NAME).returncode == 0
    assert all("--namespace=default" in call for call in cluster.calls("kubectl"))


def test_other_settings_must_be_deleted_first(cluster):
    cluster.launch("gke.sh", "apply", *SLICE)
    done = cluster.launch("gke.sh", "apply", *SLICE, "--spot")
    assert done.returncode == 2
    assert "gke.sh delete, then apply" in done.stderr


@pytest.mark.parametrize(
    ("missing", "text", "hint"),
    [
        ("no-jobset", "error: the server doesn't have a resource type", "no JobSet: https://"),
        ("no-jobset", "connection refused", "get-credentials"),
        ("no-queue", "", "no Kueue queue q"),
    ],
)
def test_says_what_the_cluster_lacks(cluster, missing, text, hint):
    (cluster.state / missing).write_text(text)
    done = cluster.launch("gke.sh", "apply", *SLICE, "--queue=q")
    assert done.returncode == 2
    assert hint in done.stderr.splitlines()[-1]
    assert not [call for call in cluster.calls() if "apply" in call]


def test_the_image_is_of_the_commit_alone(machine):
    machine.git(machine.clone, "init", "--quiet")
    machine.git(machine.clone, "add", "launch/Dockerfile")
    machine.git(machine.clone, "commit", "--quiet", "--message=a")
    machine.command("docker", '[[ $1 != build ]] || tar --list > "$STATE/context"')
    done = machine.launch("gke.sh", "image", "--image=r/it's:1")
    assert done.returncode == 0, done.stderr
    assert (machine.state / "context").read_text().split() == ["launch/", "launch/Dockerfile"]
    build, push = machine.calls("docker")
    assert build[1:] == ["build", "--file", "launch/Dockerfile", "--tag", "r/it's:1", "-"]
    assert push[1:] == ["push", "r/it's:1"]
