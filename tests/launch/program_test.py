"""launch/program.sh and launch/slurm_job.sh around a stand-in of the training program."""

import subprocess
import sys
import time

import pytest

# `-m mmmem_jax.main` does what $DO says; the rest is Python.
PYTHON = f"""
[[ $1 != - ]] || exec "{sys.executable}" "$@"
workdir=${{3#--workdir=}}
mkdir -p "$workdir"
[[ ! -e $workdir/finished ]] || exit 9
eval "$DO"
"""
PREEMPTED = 'touch "$workdir/preempted.json"'


@pytest.fixture
def program(machine):
    """A machine whose `python` is the stand-in."""
    machine.command("python", PYTHON)
    return machine


def _train(program, do, *flags):
    workdir = program.state / "a run"
    done = program.launch("program.sh", "python", workdir, *flags, DO=do)
    return done, workdir


def test_hands_the_flags_on_and_marks_the_end(program):
    flags = ["--config=x.py:y", "--config.a=it's $(touch pwned) *"]
    done, workdir = _train(program, "exit 0", *flags)
    assert done.returncode == 0, done.stderr
    trained = ["python", "-m", "mmmem_jax.main", f"--workdir={workdir}", *flags]
    assert trained in program.calls()
    assert [path.name for path in workdir.iterdir()] == ["finished"]


@pytest.mark.parametrize("code", [1, 2, 42])
def test_exits_with_the_code_of_the_program(program, code):
    done, workdir = _train(program, f"exit {code}")
    assert done.returncode == code
    assert not (workdir / "finished").exists()


def test_a_preemption_is_75_and_the_same_command_ends_it(program):
    done, workdir = _train(program, PREEMPTED)
    assert done.returncode == 75
    assert not (workdir / "finished").exists()
    done, _ = _train(program, 'rm "$workdir/preempted.json"')
    assert done.returncode == 0, done.stderr
    assert (workdir / "finished").exists()
    # Run again, the mark of the last end goes first: the stand-in exits with 9 where it is there.
    assert _train(program, "exit 0")[0].returncode == 0


def test_hands_sigterm_on_and_waits_until_it_has_saved(program):
    """As process 1 of a container, bash gets the signal and Python does not."""
    do = (
        f'trap \'{PREEMPTED}; sleep 0.3; touch "$workdir/saved"; exit 0\' TERM; touch "$workdir/up"'
    )
    workdir = program.state / "run"
    env = {
        "PATH": f"{program.state / 'bin'}:/usr/bin:/bin",
        "CALLS": str(program.state / "calls"),
        "DO": f"{do}; while :; do sleep 0.05; done",
    }
    command = ["bash", "launch/program.sh", "python", str(workdir)]
    with subprocess.Popen(command, cwd=program.clone, env=env) as process:
        try:
            until = time.monotonic() + 30
            while not (workdir / "up").exists() and time.monotonic() < until:
                time.sleep(0.02)
            process.terminate()
            assert process.wait(timeout=30) == 75
        finally:
            process.kill()
    assert (workdir / "saved").exists()


class TestSlurmJob:
    """What sbatch runs on the first node."""

    @pytest.fixture
    def cluster(self, program):
        program.command("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        program.command("scontrol")
        program.command("squeue", 'echo "$JOB_STATE"')
        return program

    def _job(self, cluster, do, state="RUNNING", **env):
        workdir = cluster.state / "a run"
        args = ("python", workdir, "--config=x.py", "--config.a=b c")
        return cluster.launch(
            "slurm_job.sh", *args, DO=do, JOB_STATE=state, SLURM_JOB_ID="7", **env
        )

    def test_trains_once_where_nothing_happens(self, cluster):
        done = self._job(cluster, "exit 0", SLURM_CPUS_PER_TASK="12")
        assert done.returncode == 0, done.stderr
        calls = cluster.calls()
        (srun,) = [call for call in calls if call[0] == "srun"]
        workdir = cluster.state / "a run"
        assert srun[1:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
        assert srun[3:6] == ["python", "-m", "mmmem_jax.main"]
        assert srun[6:] == [f"--workdir={workdir}", "--config=x.py", "--config.a=b c"]
        assert not [call for call in calls if call[0] == "scontrol"]

    def test_is_queued_again_after_a_preemption(self, cluster):
        done = self._job(cluster, PREEMPTED)
        assert done.returncode == 0, done.stderr
        assert cluster.calls("scontrol") == [["scontrol", "requeue", "7"]]

    def test_is_queued_again_where_it_was_stopped_before_the_first_step(self, cluster):
        done = self._job(cluster, "kill -TERM $$")
        assert done.returncode == 0, done.stderr
        assert cluster.calls("scontrol") == [["scontrol", "requeue", "7"]]

    def test_is_not_queued_again_when_cancelled(self, cluster):
        done = self._job(cluster, PREEMPTED, state="COMPLETING")
        assert done.returncode == 0, done.stderr
        assert cluster.calls("scontrol") == []

    def test_is_not_queued_again_after_an_error(self, cluster):
        done = self._job(cluster, "exit 1")
        assert done.returncode == 1
        assert cluster.calls("scontrol") == []
