"""The set of hosts for GKE, the image, and the script that starts both against stand-ins."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from stand_ins import LAUNCH, ROOT, one_error, recorded, recorder, write_program

from colbert_jax import cli

# --- the set of hosts ---


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """A JSON schema of an object with these fields and no other."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def each(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
COUNT = {"type": "integer", "minimum": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
CHIPS = fields({"google.com/tpu": COUNT})
CONTAINER = fields(
    {"name": NAME, "image": TEXT, "args": each(TEXT), "resources": fields({"limits": CHIPS})},
    env=each(fields({"name": TEXT, "value": {"type": "string"}})),
    securityContext=fields({"runAsUser": {"type": "integer", "minimum": 0}}),
    volumeMounts=each(fields({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}})),
)
CONTAINER["properties"]["resources"]["properties"]["requests"] = CHIPS
CSI = fields({"driver": TEXT}, volumeAttributes=TEXTS)
PODS = fields(
    {"restartPolicy": {"const": "Never"}, "containers": each(CONTAINER)},
    terminationGracePeriodSeconds=COUNT,
    serviceAccountName=NAME,
    nodeSelector=TEXTS,
    volumes=each(fields({"name": NAME, "csi": CSI})),
)
ON_EXIT = fields(
    {"operator": {"enum": ["In", "NotIn"]}, "values": each({"type": "integer"})},
    containerName=NAME,
)
JOBS = fields(
    {
        "completions": COUNT,
        "parallelism": COUNT,
        "backoffLimit": {"const": 0},
        "template": fields({"spec": PODS}, metadata=fields({}, annotations=TEXTS)),
    },
    completionMode={"const": "Indexed"},
    podFailurePolicy=fields(
        {"rules": each(fields({"action": {"const": "FailJob"}, "onExitCodes": ON_EXIT}))}
    ),
)
ACTIONS = {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]}
REASONS = {
    "enum": [
        *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
        *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
    ]
}
JOBSET = fields(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": fields({"name": NAME}, annotations=TEXTS),
        "spec": fields(
            {
                "failurePolicy": fields(
                    {"maxRestarts": COUNT},
                    rules=each(
                        fields({"action": ACTIONS, "name": TEXT}, onJobFailureReasons=each(REASONS))
                    ),
                ),
                "replicatedJobs": each(
                    fields({"name": NAME, "replicas": COUNT, "template": fields({"spec": JOBS})})
                ),
            }
        ),
    }
)


def jobset() -> Any:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def pods_of(document: Any) -> Any:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_jobset_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(jobset(), JOBSET)


@pytest.mark.parametrize(
    "where, value",
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 4),
        (("spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"), 6),
        (("spec", "replicatedJobs", 0, "replica"), 1),
        (("metadata", "name"), "Colbert_JAX"),
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_what_the_api_does(where: tuple[Any, ...], value: Any) -> None:
    broken = copy.deepcopy(jobset())
    inner = broken
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOBSET)


def test_the_jobset_fills_its_slice_and_agrees_with_itself() -> None:
    document = jobset()
    (jobs,) = document["spec"]["replicatedJobs"]
    job, pod = jobs["template"]["spec"], pods_of(document)
    (container,) = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert x * y == chips * job["completions"] and job["parallelism"] == job["completions"]
    assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [cli.USER_ERROR_STATUS]
    assert {"name": "COLBERT_JAX_HOSTS", "value": "auto"} in container["env"]
    # What the file says is to be replaced, and nothing else, has a dollar.
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    values = [line.partition("#")[0] for line in text.splitlines()]
    assert re.findall(r"\$\S*", "\n".join(values)) == ["${IMAGE}", "${BUCKET}"]


def test_the_jobset_trains_with_flags_that_there_are() -> None:
    (container,) = pods_of(jobset())["containers"]
    given = dict(argument.split("=", 1) for argument in container["args"])
    config = ROOT / given.pop("--config")
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(given.pop("--workdir").startswith(f"{mount}/") for mount in mounts)
    namespace: dict[str, Any] = {}
    exec(config.read_text(), namespace)
    keys = [key.removeprefix("--config.") for key in given]
    assert all(key.startswith("--config.") for key in given)
    cli.check_keys(namespace["get_config"](), keys)


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def extras() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (found,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    ]
    assert isinstance(found, ast.Dict)
    return {key.value for key in found.keys if isinstance(key, ast.Constant)}


def test_the_image_copies_what_there_is_and_what_is_needed() -> None:
    copied: set[str] = set()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                if (ROOT / source).is_dir():  # whose content, not itself, is copied
                    assert target == f"./{source}"
            copied |= set(sources)
    assert copied == {
        *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
        *("colbert_jax", "configs", "launch"),
    }


def test_the_image_installs_an_extra_that_there_is_and_trains_without_root() -> None:
    given = instructions()
    names = [name for name, _ in given]
    arguments = dict(rest.split("=", 1) for name, rest in given if name == "ARG")
    assert set(arguments) == {"EXTRA"} and arguments["EXTRA"] == "tpu"
    assert {"tpu", "cuda"} <= extras()
    installs = [i for i, (name, rest) in enumerate(given) if name == "RUN" and "pip" in rest]
    (install,) = installs
    assert '".[${EXTRA}]"' in given[install][1]
    assert names[0] == "FROM" and re.fullmatch(r"python:3\.1[1-9]-slim", given[0][1])
    (user,) = [i for i, name in enumerate(names) if name == "USER"]
    assert given[user][1] not in ("root", "0") and user > install
    assert any(rest.startswith("useradd") and given[user][1] in rest for _, rest in given)
    assert given[-1][0] == "ENTRYPOINT"
    assert json.loads(given[-1][1]) == ["python", "launch/train.py"]


# --- the script ---

IMAGE, BUCKET = "europe-docker.pkg.dev/project/images/colbert_jax:tpu", "my-bucket"
GIVEN = (f"--image={IMAGE}", f"--bucket={BUCKET}")
ENVSUBST = """
    #!python
    import os, re, sys
    names = re.findall(r"\\w+", sys.argv[1])
    sys.stdout.write(re.sub(r"\\$\\{(%s)\\}" % "|".join(names), lambda m: os.environ[m[1]],
                            sys.stdin.read()))
"""
# Records as the others do; what it is to apply is kept too, and pods are there at the second look.
KUBECTL = (
    recorder("kubectl")
    + """
        if sys.argv[1] == "apply":
            with open(os.environ["APPLIED"], "w") as file:
                file.write(sys.stdin.read())
        looked = os.environ["APPLIED"] + ".looked"
        if sys.argv[1:3] == ["get", "pods"]:
            if os.path.exists(looked):
                print("pod/colbert-jax-slice-0-0-abcde")
            open(looked, "w").close()
"""
)


class Gke:
    """The script, with docker, kubectl and envsubst that are stand-ins."""

    def __init__(self, folder: Path):
        self.folder, self.programs = folder, folder / "bin"
        write_program(self.programs / "docker", recorder("docker"))
        write_program(self.programs / "kubectl", KUBECTL)
        write_program(self.programs / "envsubst", ENVSUBST)
        write_program(self.programs / "sleep", recorder("sleep"))

    def run(self, *flags: str, command: list[str] | None = None) -> Any:
        environment = os.environ | {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "RECORD": str(self.folder / "record"),
            "APPLIED": str(self.folder / "applied"),
        }
        return subprocess.run(
            command or ["bash", str(LAUNCH / "gke.sh"), *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT if command else self.folder,
        )

    def calls(self) -> list[list[str]]:
        return [[name, *given] for name, given, _ in recorded(self.folder / "record")]


@pytest.fixture
def gke(tmp_path: Path) -> Gke:
    return Gke(tmp_path)


def first_host(gke: Gke) -> str:
    """What selects the pod that the script follows."""
    (followed,) = [call for call in gke.calls() if call[:2] == ["kubectl", "logs"]]
    assert "--follow" in followed
    return followed[-1]


def test_the_image_is_made_the_set_applied_and_the_first_host_followed(gke: Gke) -> None:
    result = gke.run(*GIVEN, "--build")
    assert result.returncode == 0, result.stderr
    selector = first_host(gke)
    name = jobset()["metadata"]["name"]
    assert selector == (
        f"--selector=jobset.sigs.k8s.io/jobset-name={name},"
        "batch.kubernetes.io/job-completion-index=0"
    )
    build = ["docker", "build", "-f", "launch/Dockerfile", "--build-arg", "EXTRA=tpu"]
    assert gke.calls() == [
        [*build, "-t", IMAGE, "."],
        ["docker", "push", IMAGE],
        ["kubectl", "apply", "-f", "-"],
        ["kubectl", "get", "pods", selector, "-o", "name"],
        ["sleep", "5"],
        ["kubectl", "get", "pods", selector, "-o", "name"],
        ["kubectl", "wait", "--for=condition=Ready", "--timeout=30m", "pod", selector],
        ["kubectl", "logs", "--follow", "--tail=-1", selector],
    ]


def test_what_is_applied_is_the_set_with_image_and_bucket(gke: Gke) -> None:
    assert gke.run(*GIVEN).returncode == 0
    applied = yaml.safe_load((gke.folder / "applied").read_text())
    jsonschema.validate(applied, JOBSET)
    pod = pods_of(applied)
    assert pod["containers"][0]["image"] == IMAGE
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == BUCKET
    assert "docker" not in {call[0] for call in gke.calls()}


def test_a_check_starts_nothing(gke: Gke) -> None:
    assert gke.run(*GIVEN, "--check").returncode == 0
    assert gke.calls() == [["kubectl", "apply", "--dry-run=server", "-f", "-"]]


@pytest.mark.parametrize(
    "flags", [(*GIVEN, "--build"), (*GIVEN, "--check"), ("--delete",)], ids=" ".join
)
def test_a_dry_run_prints_the_commands_of_a_run(flags: tuple[str, ...], gke: Gke) -> None:
    printed = gke.run(*flags, "--dry-run")
    assert printed.returncode == 0 and gke.calls() == []
    assert gke.run(command=["bash", "-ec", printed.stdout]).returncode == 0
    pasted = gke.calls()
    (gke.folder / "record").unlink()
    (gke.folder / "applied.looked").unlink(missing_ok=True)
    assert gke.run(*flags).returncode == 0
    assert gke.calls() == pasted and pasted


def test_delete_ends_the_set(gke: Gke) -> None:
    assert gke.run("--delete").returncode == 0
    assert gke.calls() == [["kubectl", "delete", "jobset", jobset()["metadata"]["name"]]]


@pytest.mark.parametrize(
    "flags, said",
    [
        (GIVEN[:1], "--bucket is missing"),
        (GIVEN[1:], "--image is missing"),
        ((GIVEN[0], "--bucket=gs://my-bucket"), "without gs://"),
        (("--image=x; rm -rf *", GIVEN[1]), "is no name of an image"),
        (("--image=$(id)", GIVEN[1]), "is no name of an image"),
        ((*GIVEN, "--config=configs/pretrain.py"), "is no flag of gke.sh"),
        (("--delete", *GIVEN), "--delete takes no other flag"),
    ],
)
def test_flags_that_cannot_be_used_are_one_sentence(
    flags: tuple[str, ...], said: str, gke: Gke
) -> None:
    assert said in one_error(gke.run(*flags)) and gke.calls() == []


@pytest.mark.parametrize("missing", ["kubectl", "docker", "envsubst"])
def test_a_missing_program_is_named_before_anything_is_done(missing: str, gke: Gke) -> None:
    (gke.programs / missing).unlink()
    for name in ("bash", "dirname", "sed", "env"):  # all that it needs beside the three
        found = shutil.which(name)
        assert found
        (gke.programs / name).symlink_to(found)
    environment = {"PATH": str(gke.programs), "RECORD": str(gke.folder / "record")}
    result = subprocess.run(
        ["bash", str(LAUNCH / "gke.sh"), *GIVEN, "--build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"there is no {missing} on PATH" in one_error(result) and gke.calls() == []


def test_a_failed_build_starts_nothing(gke: Gke) -> None:
    write_program(gke.programs / "docker", recorder("docker") + "        sys.exit(7)\n")
    assert gke.run(*GIVEN, "--build").returncode == 7
    assert [call[:2] for call in gke.calls()] == [["docker", "build"]]
