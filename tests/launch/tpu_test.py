"""launch/tpu.sh against a stand-in of gcloud that keeps one queued resource."""

import pytest

# Its state is in $STATE/qr, absent where there is none; $STATE/error is what create fails with.
# $STATE/fate has the states it takes, one a line, for each time that it is asked for; after them,
# the training has finished. $STATE/down makes one call fail.
GCLOUD = """
case "$*" in
  *' describe '*failedData*) echo 'No capacity' ;;
  *' describe '*)
    if [[ -e $STATE/down ]]; then rm "$STATE/down"; echo 'the net is down' >&2; exit 1; fi
    if [[ -s $STATE/fate ]]; then
      head -n 1 "$STATE/fate" > "$STATE/qr"; sed -i 1d "$STATE/fate"
    fi
    [[ -e $STATE/qr ]] || { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    cat "$STATE/qr" ;;
  *' create '*)
    if [[ -e $STATE/error ]]; then cat "$STATE/error" >&2; exit 1; fi
    if [[ -e $STATE/qr ]]; then echo ALREADY_EXISTS >&2; exit 1; fi
    echo WAITING_FOR_RESOURCES > "$STATE/qr" ;;
  *' delete '*)
    if [[ ! -e $STATE/qr ]]; then echo NOT_FOUND >&2; exit 1; fi
    rm "$STATE/qr" ;;
  'storage ls '*) [[ -e $STATE/fate && ! -s $STATE/fate ]] ;;
esac
"""
PLACE = ["--project=p", "--zone=z", "--name=n"]
PROGRAM = ["--workdir=gs://b/run", "--repo=https://example.com/r.git", "--ref=main"]
CREATE = ["create", *PLACE, *PROGRAM, "--accelerator-type=v5p-8"]


@pytest.fixture
def cloud(machine):
    machine.command("gcloud", GCLOUD)
    return machine


def _verbs(calls):
    """What gcloud was asked to do with the queued resource: describe, create, delete."""
    return [call[4] for call in calls if "queued-resources" in call]


def test_create_and_delete_twice_is_once(cloud):
    first, second = (cloud.launch("tpu.sh", *CREATE) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "n is there already: WAITING_FOR_RESOURCES" in second.stdout
    assert _verbs(cloud.calls()) == ["describe", "create", "describe"]
    first, second = (cloud.launch("tpu.sh", "delete", *PLACE) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "n is not there" in second.stdout
    assert _verbs(cloud.calls()) == ["describe", "delete", "describe"]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_create_asks_anew_for_what_was_taken_away(cloud, state):
    (cloud.state / "qr").write_text(state)
    done = cloud.launch("tpu.sh", *CREATE)
    assert done.returncode == 0, done.stderr
    assert f"n is {state}; it is asked for anew. No capacity" in done.stdout
    verbs = _verbs(cloud.calls())
    assert verbs == ["describe", "describe", "delete", "create"]


@pytest.mark.parametrize("state", ["ACTIVE", "PROVISIONING", "SUSPENDING", "DELETING"])
def test_create_leaves_alone_what_is_there(cloud, state):
    (cloud.state / "qr").write_text(state)
    done = cloud.launch("tpu.sh", *CREATE)
    assert done.returncode == 0, done.stderr
    assert state in done.stdout
    assert _verbs(cloud.calls()) == ["describe"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPodPerProject' exceeded", "iam-admin/quotas"),
        ("PERMISSION_DENIED: tpu.nodes.create", "roles/tpu.admin"),
        ("Cloud TPU API has not been used in project 1", "services enable tpu.googleapis.com"),
        ("Please run: $ gcloud auth login", "not logged in"),
        ("INVALID_ARGUMENT: what", "see above"),
    ],
)
def test_create_says_what_to_do_about_an_error(cloud, error, hint):
    (cloud.state / "error").write_text(error)
    done = cloud.launch("tpu.sh", *CREATE)
    assert done.returncode == 2
    shown, line = done.stderr.splitlines()
    assert shown == error
    assert line.startswith("tpu.sh: ")
    assert hint in line


@pytest.mark.parametrize("command", ["setup", "run", "tail"])
def test_nothing_is_run_on_a_tpu_that_is_not_active(cloud, command):
    args = [] if command == "tail" else PROGRAM
    done = cloud.launch("tpu.sh", command, *PLACE, *args)
    assert done.returncode == 2
    assert "n is NONE, not ACTIVE" in done.stderr
    assert _verbs(cloud.calls()) == ["describe"]


def test_status_tells_why_it_failed(cloud):
    (cloud.state / "qr").write_text("FAILED")
    assert cloud.launch("tpu.sh", "status", *PLACE).stdout == "FAILED\nNo capacity\n"


def test_what_workers_are_told_survives_their_shell(cloud):
    """The words that bash on a worker makes of the remote command are those that were given."""
    (cloud.state / "qr").write_text("ACTIVE")
    cloud.command("sudo")
    workdir, flags = 'gs://b/it\'s "x" $(touch pwned)', ["--config.a=`x`  y\\", "--config.b=';&|"]
    args = [*PLACE, *PROGRAM, f"--workdir={workdir}", "--", *flags]
    done = cloud.launch("tpu.sh", "run", *args)
    assert done.returncode == 0, done.stderr
    *_, ssh = cloud.calls("gcloud")
    assert "--worker=all" in ssh
    (remote,) = [arg for arg in ssh if arg.startswith("--command=")]
    cloud.run("bash", "-c", remote.removeprefix("--command="))
    code = ["https://example.com/r.git", "main"]
    mesh, cache = "--config.mesh.data=-1", f"--compilation_cache={workdir}/compiled"
    words = ["run", *code, workdir, "--config=configs/sib_grpo.py", mesh, cache, *flags]
    assert cloud.calls() == [["sudo", "bash", "mmmem_startup.sh", *words]]
    assert not (cloud.clone / "pwned").exists()


def test_keep_creates_again_until_the_training_has_finished_then_deletes(cloud):
    states = ["ACTIVE", "SUSPENDED", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE", "ACTIVE"]
    (cloud.state / "fate").write_text("\n".join(states) + "\n")
    done = cloud.launch("tpu.sh", "keep", *CREATE[1:], "--poll=0")
    assert done.returncode == 0, done.stderr
    verbs = _verbs(cloud.calls())
    assert verbs.count("create") == 2
    assert verbs[-1] == "delete"
    assert "The training has finished" in done.stdout
    assert not (cloud.state / "qr").exists()


def test_keep_outlives_the_net_but_not_a_mistake(cloud):
    (cloud.state / "fate").write_text("ACTIVE\nACTIVE\nACTIVE\n")
    cloud.command("sleep", '[[ -e $STATE/slept ]] || touch "$STATE/slept" "$STATE/down"')
    done = cloud.launch("tpu.sh", "keep", *CREATE[1:], "--poll=0")
    assert done.returncode == 0, done.stderr
    assert "the net is down" in done.stderr
    (cloud.state / "error").write_text("PERMISSION_DENIED")
    done = cloud.launch("tpu.sh", "keep", *CREATE[1:], "--poll=0")
    assert done.returncode == 2


class TestCode:
    """Which commit the workers fetch."""

    @pytest.fixture
    def clone(self, cloud):
        cloud.git(cloud.clone, "init", "--quiet")
        cloud.git(cloud.clone, "add", "launch")
        cloud.git(cloud.clone, "commit", "--quiet", "--message=a")
        cloud.git(cloud.clone, "remote", "add", "origin", "https://example.com/origin.git")
        cloud.git(cloud.clone, "update-ref", "refs/remotes/origin/main", "HEAD")
        return cloud

    def _create(self, clone):
        return clone.launch(
            *("tpu.sh", "create", *PLACE, "--workdir=gs://b/r", "--accelerator-type=v5p-8"),
            "--dry-run",
        )

    def test_is_that_of_the_clone(self, clone):
        done = self._create(clone)
        assert done.returncode == 0, done.stderr
        commit = clone.git(clone.clone, "rev-parse", "HEAD")
        assert f"mmmem-repo=https://example.com/origin.git||mmmem-ref={commit}||" in done.stdout
        assert done.stderr == ""

    def test_must_have_been_pushed(self, clone):
        clone.git(clone.clone, "commit", "--quiet", "--allow-empty", "--message=b")
        done = self._create(clone)
        assert done.returncode == 2
        assert "has not been pushed" in done.stderr

    def test_has_not_what_is_not_committed(self, clone):
        (clone.clone / "launch/README.md").write_text("")
        done = self._create(clone)
        assert done.returncode == 0
        assert "not committed stay here" in done.stderr

    def test_must_be_given_where_there_is_no_origin(self, clone):
        clone.git(clone.clone, "remote", "remove", "origin")
        assert "--repo is missing" in self._create(clone).stderr
