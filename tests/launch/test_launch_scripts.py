"""What starts training on pods, clusters and one machine, run against stand-ins for their programs.

A stand-in lies first on PATH and records its arguments; that of gcloud also keeps a little cloud in
a folder: a pod whose workers are home folders, in which it really runs what it is told to.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from stand_ins import LAUNCH, ROOT, one_error, recorded, recorder, wait_for, write_program

from colbert_jax.errors import UserError
from colbert_jax.sharding import join_hosts

SCRIPTS = ("tpu_pod.sh", "gke.sh", "local_pod.sh", "slurm.sbatch")

# What a careless script would split, expand, run or lose.
HARD = (
    "--config.input.files=('a b.jsonl','c$HOME.jsonl')",
    '--config.model.query_prompt=say "hi"; rm -rf *',
    "--config.model.document_prompt=",
    "--config.x=`id` & \\ | > <",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=bash", LAUNCH / name],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SCRIPTS[:2])
def test_help_is_the_scripts_own_head(name: str) -> None:
    result = subprocess.run(
        ["bash", LAUNCH / name, "--help"], capture_output=True, text=True, check=True
    )
    assert f"launch/{name}" in result.stdout and "--dry-run" in result.stdout
    assert "#" not in result.stdout and "set -" not in result.stdout


# --- TPU pods ---

GCLOUD = """
    #!python
    import json, os, shutil, subprocess, sys
    from pathlib import Path

    cloud = Path(os.environ["CLOUD"])
    arguments = sys.argv[1:]
    with open(cloud / "calls.jsonl", "a") as file:
        file.write(json.dumps(arguments) + "\\n")
    if (cloud / "unreachable").exists():
        sys.exit("ERROR: (gcloud) You do not have an active account.")
    assert arguments[:2] == ["compute", "tpus"], arguments
    what, verb, *rest = arguments[2:]
    flags = dict(a[2:].partition("=")[::2] for a in rest if a.startswith("--"))
    names = [a for a in rest if not a.startswith("--")]
    kept = cloud / what
    if verb == "describe" and what == "tpu-vm" and (cloud / "late").exists():
        (cloud / "late").unlink()
        kept.write_text("PREEMPTED")

    if verb == "describe":
        if not kept.exists():
            sys.exit(f"ERROR: (gcloud.compute.tpus.{what}.describe) NOT_FOUND: no such thing")
        assert flags["format"] == ("value(state)" if what == "tpu-vm" else "value(state.state)")
        print(kept.read_text())
    elif verb == "create":
        assert what == "queued-resources" and not kept.exists()
        shutil.rmtree(cloud / "workers", ignore_errors=True)
        for i in range(2):
            (cloud / "workers" / str(i)).mkdir(parents=True)
        kept.write_text("ACTIVE")
        (cloud / "tpu-vm").write_text("READY")
    elif verb == "delete":
        kept.unlink()
        (cloud / "tpu-vm").unlink(missing_ok=True)
    else:
        if (cloud / "tpu-vm").read_text() != "READY":
            sys.exit(255)
        workers = sorted((cloud / "workers").iterdir())
        chosen = workers if flags["worker"] == "all" else [workers[int(flags["worker"])]]
        for home in chosen:
            if verb == "scp":
                source, target = names
                shutil.copy(source, home / target.split(":")[1])
                continue
            path = f"{cloud / 'remote'}:/usr/local/bin:/usr/bin:/bin"
            told = {"HOME": str(home), "PATH": path, "CLOUD": str(cloud)}
            told["RECORD"] = str(cloud / "done")
            ended = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=told)
            if ended.returncode:
                sys.exit(ended.returncode)
"""

# A worker's Python: it makes an environment whose Python acts as the plan's next word says.
REMOTE_PYTHON = """
    #!python
    import os, shutil, sys
    from pathlib import Path

    if sys.argv[1:4] == ["-m", "uv", "venv"]:
        (Path(sys.argv[-1]) / "bin").mkdir(parents=True)
        shutil.copy(Path(os.environ["CLOUD"]) / "training", Path(sys.argv[-1]) / "bin" / "python")
"""

TRAINING = """
    #!python
    import json, os, signal, sys, time
    from pathlib import Path

    cloud, worker = Path(os.environ["CLOUD"]), Path(os.environ["HOME"]).name
    log = cloud / f"trained-{worker}.jsonl"
    told = [sys.argv[1:], os.environ.get("COLBERT_JAX_HOSTS"), os.getcwd()]
    with log.open("a") as file:
        file.write(json.dumps(told) + "\\n")
    with (cloud / f"pids-{worker}").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    plan = json.loads((cloud / "plan").read_text())
    act = plan[min(len(log.read_text().splitlines()), len(plan)) - 1]
    print(f"worker {worker} at work", flush=True)
    if act == "preempted":
        if worker == "0":
            (cloud / "tpu-vm").write_text("PREEMPTED")
        sys.exit(1)
    if act == "preempted late":
        (cloud / "late").touch()
        sys.exit(1)
    if act == "gone" and worker == "0":
        os.killpg(0, signal.SIGKILL)
    if act in ("gone", "waits"):
        for _ in range(600):
            if (cloud / "go on").exists():
                sys.exit(0)
            time.sleep(0.05)
    sys.exit(int(act))
"""


class Pods:
    """A cloud, and a checkout whose script uses it."""

    def __init__(self, cloud: Path, repository: Path) -> None:
        self.cloud, self.repository = cloud, repository
        for name, text in (
            ("bin/gcloud", GCLOUD),
            ("training", TRAINING),
            ("remote/python3", REMOTE_PYTHON),
            ("remote/gcsfuse", recorder("gcsfuse")),
            ("remote/sudo", recorder("sudo")),
            ("remote/mountpoint", "#!/bin/sh\nexit 1\n"),
            # As it is, but it looks oftener than once a second whether training goes on.
            ("remote/tail", f'#!/bin/sh\nexec {shutil.which("tail")} -s 0.1 "$@"\n'),
        ):
            write_program(self.cloud / name, text)
        self.plan("0")

    def plan(self, *acts: str) -> None:
        (self.cloud / "plan").write_text(json.dumps(acts))

    def started(self, *arguments: str) -> subprocess.Popen[str]:
        path = f"{self.cloud / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            [self.repository / "launch" / "tpu_pod.sh", *arguments],
            env=os.environ | {"PATH": path, "CLOUD": str(self.cloud), "TPU_POD_PAUSE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=self.cloud,  # it has to find its repository by itself
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.started(*arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        return recorded(self.cloud / "calls.jsonl")

    def verbs(self) -> list[str]:
        """What was made and removed, in order."""
        return [" ".join(c[2:4]) for c in self.calls() if c[3] in ("create", "delete")]

    def trained(self, worker: int = 0) -> list[Any]:
        return recorded(self.cloud / f"trained-{worker}.jsonl")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch/tpu_pod.sh", "configs/pretrain.py", ".gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "--message=all")):
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture
def pods(tmp_path: Path, checkout: Path) -> Iterator[Pods]:
    shutil.rmtree(checkout / "build", ignore_errors=True)
    made = Pods(tmp_path, checkout)
    yield made
    (made.cloud / "go on").touch()  # nothing goes on when a test has failed


POD = ("--name=my-pod", "--zone=us-west4-a", "--type=v5litepod-16")
TRAIN = ("--", "--config=configs/pretrain.py", "--workdir=gs://my-bucket/runs/a", *HARD)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--name is missing"),
        (POD[:1], "--zone is missing"),
        (POD[:2], "--type is missing"),
        (("--name", "x"), "--name has no value"),
        ((*POD, "--spott"), "'--spott' is no flag"),
        ((*POD, "--config=configs/pretrain.py"), "comes after --"),
        (("--name=My_Pod", *POD[1:], *TRAIN), "--name=My_Pod"),
        (("--name=my-pod;ls", *POD[1:], *TRAIN), "--name=my-pod;ls"),
        (("--name=my-pod", "--zone=us-west4", POD[2], *TRAIN), "--zone=us-west4"),
        ((*POD[:2], "--type=h100-8", *TRAIN), "give --version"),
        ((*POD, "--max-restarts=many", *TRAIN), "--max-restarts=many"),
        (POD, "--config is missing"),
        ((*POD, "--", "--workdir=gs://b/a"), "--config is missing"),
        ((*POD, *TRAIN[:2]), "--workdir has to be storage that all workers share"),
        ((*POD, *TRAIN[:2], "--workdir=runs/a"), "--workdir has to be storage"),
        ((*POD, "--", "--config=configs/none.py", TRAIN[2]), "not in the last commit"),
        ((*POD, "--delete", *TRAIN), "--delete trains nothing"),
    ],
)
def test_a_pods_flags_that_cannot_be_used_are_one_sentence(
    pods: Pods, arguments: tuple[str, ...], message: str
) -> None:
    assert message in one_error(pods.run(*arguments))
    assert pods.calls() == []


def test_without_gcloud_nothing_is_tried(pods: Pods) -> None:
    (pods.cloud / "bin" / "gcloud").unlink()
    (pods.cloud / "only").mkdir()
    for name in ("bash", "git", "dirname", "env"):
        (pods.cloud / "only" / name).symlink_to(str(shutil.which(name)))
    result = subprocess.run(
        [pods.repository / "launch" / "tpu_pod.sh", *POD, *TRAIN],
        env={"PATH": str(pods.cloud / "only")},
        capture_output=True,
        text=True,
    )
    assert "gcloud is not installed" in one_error(result)


def changing(calls: list[list[str]]) -> list[list[str]]:
    """Without the looks at what there is."""
    return [c for c in calls if c[3] != "describe" and "echo training=" not in c[-1]]


def test_a_dry_run_prints_what_a_run_does_and_does_nothing(pods: Pods) -> None:
    flags = (*POD, "--spot", "--project=my-project", *TRAIN)
    dry = pods.run(flags[0], "--dry-run", *flags[1:])
    assert dry.returncode == 0 and dry.stderr == "" and pods.calls() == []
    assert not (pods.repository / "build").exists()
    printed = [shlex.split(line) for line in dry.stdout.splitlines() if line[:6] == "gcloud"]
    result = pods.run(*flags)
    assert result.returncode == 0, result.stderr
    assert [["gcloud", *call] for call in changing(pods.calls())] == printed
    # The rest of what it prints is a shell's, too, and the pod's end is not pasted with it.
    subprocess.run(["bash", "-n"], input=dry.stdout, text=True, check=True)
    (last,) = [line for line in dry.stdout.splitlines() if " delete " in line]
    assert last.startswith("# gcloud compute tpus queued-resources delete my-pod ")
    until = next(line for line in dry.stdout.splitlines() if line.startswith("until "))
    assert "'--format=value(state.state)')\" = ACTIVE ]" in until


def test_a_dry_run_pasted_into_a_shell_trains(pods: Pods) -> None:
    text = pods.run(*POD, "--dry-run", *TRAIN).stdout
    path = f"{pods.cloud / 'bin'}:{os.environ['PATH']}"
    told = os.environ | {"PATH": path, "CLOUD": str(pods.cloud)}
    subprocess.run(["bash", "-e"], input=text, env=told, text=True, check=True, timeout=60)
    assert pods.trained()[0][0][3:] == list(HARD) == pods.trained(1)[0][0][3:]


def test_a_run_asks_for_the_pod_installs_starts_and_follows(pods: Pods) -> None:
    result = pods.run(*POD, "--spot", "--project=my-project", *TRAIN)
    assert result.returncode == 0, result.stderr
    created = pods.calls()[2]
    assert created == [
        *("compute", "tpus", "queued-resources", "create", "my-pod", "--node-id=my-pod"),
        *("--zone=us-west4-a", "--project=my-project", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--quiet", "--spot"),
    ]
    assert all({"--zone=us-west4-a", "--project=my-project"} < set(call) for call in pods.calls())
    for worker in (0, 1):
        ((argv, hosts, folder),) = pods.trained(worker)
        assert argv == [
            *("launch/train.py", "--config=configs/pretrain.py"),
            *("--workdir=/mnt/gs/my-bucket/runs/a", *HARD),
        ]
        assert hosts == "auto"
        assert folder == str(pods.cloud / "workers" / str(worker) / "colbert_jax_launch")
        assert (Path(folder) / "configs" / "pretrain.py").exists()
    mounted = [call for name, call, _ in recorded(pods.cloud / "done") if name == "gcsfuse"]
    assert len(mounted) == 2 and mounted[0] == mounted[1]
    assert mounted[0][-2:] == ["my-bucket", "/mnt/gs/my-bucket"]
    assert {"--rename-dir-limit=200000", "--metadata-cache-ttl-secs=0"} < set(mounted[0])
    assert "worker 0 at work" in result.stdout and "worker 1 at work" not in result.stdout
    assert "Training has finished" in result.stderr and "--delete" in result.stderr


@pytest.mark.parametrize(
    "kind, software",
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_software_goes_by_the_kind_unless_it_is_given(
    pods: Pods, kind: str, software: str
) -> None:
    flags = (*POD[:2], f"--type={kind}", "--dry-run")
    assert f"--runtime-version={software} " in pods.run(*flags, *TRAIN).stdout
    assert "--runtime-version=mine " in pods.run(*flags, "--version=mine", *TRAIN).stdout


def test_a_preempted_pod_is_made_anew_and_gets_the_same_command(pods: Pods) -> None:
    # The second time, worker 0 fails before the cloud says why.
    pods.plan("preempted", "preempted late", "0")
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert pods.verbs() == [
        "queued-resources create",
        *("queued-resources delete", "queued-resources create") * 2,
    ]
    deleted = next(call for call in pods.calls() if call[3] == "delete")
    assert "--force" in deleted and "--quiet" in deleted  # without it gcloud asks, and waits
    for worker in (0, 1):
        first, second, third = pods.trained(worker)
        assert first == second == third
    assert "starting again (2 of at most 20)" in result.stderr


def test_restarts_come_to_an_end(pods: Pods) -> None:
    pods.plan("preempted")
    result = pods.run(*POD, "--max-restarts=1", *TRAIN)
    assert result.returncode == 1 and "--max-restarts=1 are used up" in result.stderr
    assert pods.verbs().count("queued-resources create") == 2 == len(pods.trained())


def test_training_that_was_asked_to_stop_goes_on(pods: Pods) -> None:
    pods.plan("75", "0")
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 0 and "has saved what it had done" in result.stderr
    assert len(pods.trained()) == 2 and pods.verbs() == ["queued-resources create"]


def test_training_that_fails_is_not_tried_again(pods: Pods) -> None:
    pods.plan("3")
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 3 and "ended with status 3" in result.stderr
    assert "worker 1 at work" in result.stdout  # its log may hold the reason
    assert len(pods.trained()) == 1 and pods.verbs() == ["queued-resources create"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for a process in /proc")
def test_training_that_vanishes_is_started_again_on_the_same_pod(pods: Pods) -> None:
    pods.plan("gone", "0")
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert len(pods.trained()) == 2 and pods.verbs() == ["queued-resources create"]
    left, _ = (pods.cloud / "pids-1").read_text().split()  # worker 1 was still at it
    status = Path(f"/proc/{left}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_who_stops_following_stops_no_training_and_may_follow_again(pods: Pods) -> None:
    pods.plan("waits")
    process = pods.started(*POD, *TRAIN)
    wait_for(lambda: pods.trained(1) and "tail" in str(pods.calls()[-1]))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Training goes on" in err
    again = pods.started(*POD, *TRAIN)
    seen = len(pods.calls())
    wait_for(lambda: "tail" in str(pods.calls()[seen:]))
    (pods.cloud / "go on").touch()
    out, err = again.communicate(timeout=20)
    assert again.returncode == 0 and "worker 0 at work" in out and "goes on: following it" in err
    assert len(pods.trained()) == 1 == len(pods.trained(1))


def test_delete_removes_the_pod_however_it_was_made(pods: Pods) -> None:
    assert pods.run(*POD, *TRAIN).returncode == 0
    assert pods.run(*POD[:2], "--delete").returncode == 0
    (pods.cloud / "tpu-vm").write_text("READY")
    assert pods.run(*POD[:2], "--delete").returncode == 0
    assert pods.verbs()[1:] == ["queued-resources delete", "tpu-vm delete"]
    before = pods.calls()
    printed = pods.run(*POD[:2], "--delete", "--dry-run").stdout.splitlines()
    assert pods.calls() == before and printed[1].startswith("gcloud compute tpus queued-resources")


@pytest.mark.parametrize("state, deleted", [("READY", []), ("TERMINATED", ["tpu-vm delete"])])
def test_a_pod_that_is_there_is_used_if_it_can_be(
    pods: Pods, state: str, deleted: list[str]
) -> None:
    for worker in "01":
        (pods.cloud / "workers" / worker).mkdir(parents=True)
    (pods.cloud / "tpu-vm").write_text(state)
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert pods.verbs() == deleted + ["queued-resources create"] * len(deleted)


def test_a_failed_request_is_not_made_again(pods: Pods) -> None:
    (pods.cloud / "queued-resources").write_text("FAILED")
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 1 and "request for my-pod has failed" in result.stderr
    assert pods.verbs() == []


def test_a_cloud_that_does_not_answer_loses_no_pod(pods: Pods) -> None:
    (pods.cloud / "unreachable").touch()
    result = pods.run(*POD, *TRAIN)
    assert result.returncode == 1 and pods.verbs() == []
    assert "You do not have an active account" in result.stderr
    (pods.cloud / "unreachable").unlink()
    # Later, it is asked several times before anybody gives up; the pod stays.
    pods.plan("waits")
    process = pods.started(*POD, *TRAIN)
    wait_for(lambda: pods.trained(1) and "tail" in str(pods.calls()[-1]))
    (pods.cloud / "unreachable").touch()
    (pods.cloud / "go on").touch()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "does not say what state my-pod is in" in err
    assert pods.verbs() == ["queued-resources create"]


# --- hosts that JAX finds ---


@pytest.fixture
def initialized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    for name in ("JAX_COORDINATOR_ADDRESS", "COLBERT_JAX_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_hosts_are_joined_when_asked_for(
    initialized: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    join_hosts()
    assert initialized == []
    monkeypatch.setenv("COLBERT_JAX_HOSTS", "auto")
    join_hosts()
    assert initialized == [()]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")  # who says more is heeded
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    join_hosts()
    assert initialized[1:] == [("a:1", 2, 1)]


def test_hosts_that_cannot_be_found_are_the_users_error(
    initialized: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLBERT_JAX_HOSTS", "yes")
    with pytest.raises(UserError, match="COLBERT_JAX_HOSTS=yes is not known: set it to auto"):
        join_hosts()

    def fails() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    monkeypatch.setenv("COLBERT_JAX_HOSTS", "auto")
    with pytest.raises(UserError, match="JAX finds no TPU pod, GKE or Slurm here"):
        join_hosts()


JOIN = """
import jax
from colbert_jax.sharding import join_hosts
join_hosts()
print(jax.process_count(), jax.config.values["jax_cuda_visible_devices"])
"""
SLURM_TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "told, devices",
    [
        ({"COLBERT_JAX_HOSTS": "auto"}, "0"),
        # Without JAX_LOCAL_DEVICE_IDS, which launch/slurm.sbatch sets, it would be "0" here too.
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_LOCAL_DEVICE_IDS": "0,1"}, "0,1"),
    ],
)
def test_jax_joins_a_slurm_job(told: dict[str, str], devices: str, tmp_path: Path) -> None:
    if "COLBERT_JAX_HOSTS" not in told:
        told = told | {"JAX_COORDINATOR_ADDRESS": "localhost:61517"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    result = subprocess.run(
        [sys.executable, "-c", JOIN],
        env=clean | SLURM_TASK | {"JAX_PLATFORMS": "cpu"} | told,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["1", devices], result.stderr


# --- Slurm ---

SRUN = """
    #!python
    import json, os, subprocess, sys
    arguments = sys.argv[1:]
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(["srun", arguments, {}]) + "\\n")
    while arguments[0].startswith("--"):
        arguments.pop(0)
    for task in range(int(os.environ["SLURM_NTASKS"])):
        ended = subprocess.run(arguments, env=os.environ | {"SLURM_PROCID": str(task)})
        if ended.returncode:
            sys.exit(ended.returncode)
"""
JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


class Cluster:
    """A stand-in for Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        write_program(folder / "bin" / "srun", SRUN)
        write_program(folder / "bin" / "training", recorder("training"))
        hosts = '[ "$1" = show ] && { echo node1; echo node2; }\n'
        write_program(
            folder / "bin" / "scontrol",
            f'#!/bin/sh\n{hosts}echo "$*" >> "{folder}/scontrol"\n',
        )
        # Slurm runs a copy of the script, out of sight of the repository.
        shutil.copy(LAUNCH / "slurm.sbatch", folder / "job")
        self.told = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
        self.told |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "PYTHON": "training",
        }

    def started(self, *arguments: str, **told: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.folder / "job", *arguments],
            env=self.told | told,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **told: str) -> subprocess.CompletedProcess[str]:
        process = self.started(*arguments, **told)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


IN_JOB = JOB | {"SLURM_SUBMIT_DIR": str(ROOT)}


def test_each_node_gets_its_number_all_its_gpus_and_the_first_nodes_address(
    cluster: Cluster,
) -> None:
    arguments = ("--config=configs/pretrain.py", *HARD)
    result = cluster.run(*arguments, **IN_JOB)
    assert result.returncode == 0, result.stderr
    (_, srun, _), *tasks = recorded(cluster.record)
    assert srun[:3] == ["--kill-on-bad-exit=1", "--cpu-bind=none", "bash"]
    assert len(tasks) == 2
    for i, (_, argv, told) in enumerate(tasks):
        assert argv == ["launch/train.py", *arguments]
        jax_told = {k: v for k, v in told.items() if k.startswith("JAX_") and "PLATF" not in k}
        assert jax_told == {
            "JAX_COORDINATOR_ADDRESS": f"node1:{61440 + 4242 % 4096}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
            "JAX_LOCAL_DEVICE_IDS": "0,1,2,3",
        }


@pytest.mark.parametrize("how", [("--dry-run",), ()])
def test_a_jobs_dry_run_prints_what_the_job_does(cluster: Cluster, how: tuple[str, ...]) -> None:
    arguments = ("--config=configs/pretrain.py", *HARD)
    dry = cluster.run(*how, *arguments, **({} if how else {"DRY_RUN": "1"}))
    assert dry.returncode == 0 and dry.stderr == "" and recorded(cluster.record) == []
    submit, *job = dry.stdout.splitlines()
    assert shlex.split(submit) == ["sbatch", "launch/slurm.sbatch", *arguments]
    told = cluster.told | IN_JOB
    subprocess.run(["bash", "-e"], input="\n".join(job), env=told, text=True, check=True)
    pasted = recorded(cluster.record)
    cluster.record.unlink()
    assert cluster.run(*arguments, **IN_JOB).returncode == 0
    assert recorded(cluster.record) == pasted


@pytest.mark.parametrize(
    "arguments, told, message",
    [
        ((), IN_JOB, "--config is missing"),
        (("--config=a",), {}, "sbatch launch/slurm.sbatch"),
        (("--config=a",), JOB | {"SLURM_SUBMIT_DIR": "/"}, "not the repository's root"),
        (("--config=a",), IN_JOB | {"SLURM_GPUS_ON_NODE": ""}, "give --gpus-per-node"),
    ],
)
def test_a_job_that_cannot_run_is_one_sentence(
    cluster: Cluster, arguments: tuple[str, ...], told: dict[str, str], message: str
) -> None:
    assert message in one_error(cluster.run(*arguments, **told))
    assert recorded(cluster.record) == []


def test_a_jobs_status_is_its_trainings(cluster: Cluster) -> None:
    write_program(cluster.folder / "bin" / "training", "#!/bin/sh\nexit 5\n")
    assert cluster.run("--config=a", **IN_JOB).returncode == 5


@pytest.mark.parametrize(
    "status, restarts, asked, said",
    [
        (75, "0", True, "Queueing the job again"),
        (75, "3", False, "MAX_RESTARTS=3 are used up"),
        (0, "0", False, ""),  # it was just in time
    ],
)
def test_a_job_whose_time_is_nearly_over_saves_and_is_queued_again(
    cluster: Cluster, status: int, restarts: str, asked: bool, said: str
) -> None:
    folder = cluster.folder
    waits = f'while ! [ -e "{folder}/noticed" ]; do sleep 0.1; done'
    write_program(
        folder / "bin" / "training",
        f'#!/bin/sh\ntouch "{folder}/begun"\n{waits}\nexit {status}\n',
    )
    write_program(folder / "bin" / "scancel", f'#!/bin/sh\necho "$*" > "{folder}/noticed"\n')
    limits = {"SLURM_RESTART_COUNT": restarts, "MAX_RESTARTS": "3"}
    process = cluster.started("--config=a", **IN_JOB, **limits)
    wait_for((folder / "begun").exists)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and said in err
    assert (folder / "noticed").read_text() == "--signal=TERM 4242\n"
    assert ("requeue 4242" in (folder / "scontrol").read_text()) is asked


def test_a_job_asks_slurm_for_what_it_relies_on() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    head, _, rest = text.partition("\n#\n")
    asked = set(re.findall(r"^#SBATCH (\S+)$", head, re.MULTILINE))
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= asked
    assert any(option.startswith("--signal=B:USR1@") for option in asked)
    assert "#SBATCH" not in rest  # after the first command Slurm would not see it


# --- one machine ---

# As `python launch/train.py`: prints, then does as PLAN says for its number.
LOCAL = """
    #!python
    import json, os, signal, sys, time
    if sys.argv[1] == "-c":
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    number = os.environ["JAX_PROCESS_ID"]
    told = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps([sys.argv[1:], told]) + "\\n")
    act = json.loads(os.environ["PLAN"])[int(number)]

    def heard(what, frame):
        print("heard", signal.Signals(what).name, flush=True)
        if act != "deaf":
            sys.exit(0)

    for what in (signal.SIGINT, signal.SIGTERM):
        signal.signal(what, heard)
    print("begun", flush=True)
    print("and complains", file=sys.stderr, end="\\r", flush=True)
    if act in ("waits", "deaf"):
        for _ in range(600):
            time.sleep(0.05)
    while act == "7" and len(open(os.environ["RECORD"]).readlines()) < 3:
        time.sleep(0.05)
    time.sleep(0.3)  # until the others can hear
    sys.exit(int(act))
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.record = folder / "record"
        write_program(folder / "python", LOCAL)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self.told = clean | {"PYTHON": str(folder / "python"), "RECORD": str(self.record)}

    def started(self, *arguments: str, plan: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [LAUNCH / "local_pod.sh", *arguments],
            env=self.told | {"PLAN": json.dumps(plan), "LOCAL_POD_GRACE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, plan: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        process = self.started(*arguments, plan=plan)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "number of processes is missing"),
        (("--", "--config=a"), "number of processes is missing"),
        (("none", "--", "--config=a"), "'none' is no number"),
        (("0", "--", "--config=a"), "'0' is no number"),
        (("2", "3", "--", "--config=a"), "'3' is one number too many"),
        (("2", "--devices=0", "--", "--config=a"), "--devices=0"),
        (("2", "--config=a"), "comes after --"),
        (("2",), "nothing to train"),
        (("2", "--"), "nothing to train"),
    ],
)
def test_a_local_pods_flags_that_cannot_be_used_are_one_sentence(
    machine: Machine, arguments: tuple[str, ...], message: str
) -> None:
    assert message in one_error(machine.run(*arguments))
    assert not machine.record.exists()


def test_local_processes_get_their_numbers_and_their_lines_are_told_apart(
    machine: Machine,
) -> None:
    result = machine.run("3", "--devices=2", "--", "--config=a", *HARD, plan=("0",) * 3)
    assert result.returncode == 0, result.stderr
    started = sorted(recorded(machine.record), key=lambda row: row[1]["JAX_PROCESS_ID"])
    assert [row[1].pop("JAX_PROCESS_ID") for row in started] == ["0", "1", "2"]
    assert all(row == started[0] for row in started)
    argv, told = started[0]
    assert argv == [str(LAUNCH / "train.py"), "--config=a", *HARD]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", told.pop("JAX_COORDINATOR_ADDRESS"))
    assert told == {
        "JAX_NUM_PROCESSES": "3",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    said = [f"[{i}] {text}" for i in range(3) for text in ("and complains", "begun")]
    assert sorted(result.stdout.splitlines()) == said


def test_a_local_dry_run_prints_the_commands(machine: Machine) -> None:
    result = machine.run("2", "--dry-run", "--", "--config=a", *HARD)
    assert result.returncode == 0 and not machine.record.exists()
    first, second = result.stdout.splitlines()
    assert first.endswith(" &") and not second.endswith("&")
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
    words = shlex.split(second)
    assert words[0] == "env" and "JAX_PROCESS_ID=1" in words
    assert words[-2 - len(HARD) :] == [str(LAUNCH / "train.py"), "--config=a", *HARD]


def test_the_first_failure_stops_the_others_and_is_the_status(machine: Machine) -> None:
    begun = time.monotonic()
    result = machine.run("3", "--", "--config=a", plan=("waits", "7", "deaf"))
    assert result.returncode == 7 and time.monotonic() - begun < 15
    assert "[0] heard SIGTERM" in result.stdout and "[2] heard SIGTERM" in result.stdout
    assert "A process has ended with status 7" in result.stderr


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_passed_on(machine: Machine, sent: signal.Signals, status: int) -> None:
    process = machine.started("2", "--", "--config=a", plan=("waits", "waits"))
    wait_for(lambda: len(recorded(machine.record)) == 2)
    time.sleep(0.3)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == status
    for i in range(2):
        assert f"[{i}] heard {sent.name}" in out.splitlines()


@pytest.mark.slow
def test_a_local_pod_really_trains(tmp_path: Path) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    rows = [{"query": a, "document": f"{a} {b}"} for a in words for b in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "total_steps": 2,
        "log_every_steps": 1,
        "export": False,
        "compilation_cache": "",
        "input.files": f"('{tmp_path / 'pairs.jsonl'}',)",
        "input.cache_dir": tmp_path / "cache",
        "input.batch_size": 8,
        "model.remat": "none",
        "model.vocab_size": 300,
        "model.query_length": 8,
        "model.document_length": 12,
        "model.embedding_size": 8,
        "model.encoder.num_hidden_layers": 1,
        "model.encoder.hidden_size": 16,
        "model.encoder.intermediate_size": 16,
        "evals.collections": "()",
        "evals.baselines": False,
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    result = subprocess.run(
        [
            *(LAUNCH / "local_pod.sh", "2", "--devices=2", "--"),
            f"--config={ROOT / 'configs' / 'quickstart.py'}",
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ],
        env=clean | {"PYTHON": sys.executable, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    (log,) = tmp_path.rglob("metrics.jsonl")
    steps = [row["step"] for row in recorded(log) if "train/loss" in row]
    assert steps == [1, 2]
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert session["processes"] == 2 and session["devices"] == 4
