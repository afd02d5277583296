"""Dockerfile, .dockerignore and launch/gke_jobset.yaml, as far as they can be checked without Docker and Kubernetes."""

import fnmatch
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

from maskdm_jax.errors import ConfigError, Preempted


def instructions(root) -> list[tuple[str, str]]:
    """Name and arguments of each instruction of the Dockerfile."""
    lines = [line for line in (root / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(root, name) -> list[str]:
    return [text for instruction, text in instructions(root) if instruction == name]


def ignored(root, path: str) -> bool:
    """Whether .dockerignore hides a file: the last pattern that matches it, or a folder that it is in, decides."""
    hidden, parents = False, ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    for line in (root / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            names = [parent.split("/")[-1] for parent in parents] if pattern.startswith("**/") else parents
            if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
                hidden = not line.startswith("!")
    return hidden


def test_the_image_has_what_it_copies_and_installs(root):
    for text in arguments(root, "COPY"):
        for source in text.split()[:-1]:
            assert (root / source).exists(), source
            assert source == "." or not ignored(root, source), source
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [text for text in arguments(root, "RUN") if "pip install" in text]
    assert len(installs) == 1
    command = shlex.split(installs[0].split("&&")[-1])
    assert command[:4] == ["pip", "install", "-r", "requirements.txt"]
    named = re.fullmatch(r"\.\[(.*)\]", command[5])[1].split(",")
    assert named[0] == "$PLATFORM"
    assert {"cpu", "cuda", "tpu", *named[1:]} <= extras.keys()
    assert "PLATFORM=cpu" in arguments(root, "ARG")


def test_the_requirements_are_a_layer_below_the_code(root):
    steps = [(name, text) for name, text in instructions(root) if name in ("COPY", "RUN")]
    install = next(n for n, (_, text) in enumerate(steps) if "pip install" in text)
    assert ("COPY", ". .") in steps[install + 1 :]
    below = " ".join(text for name, text in steps[:install] if name == "COPY").split()
    assert {"requirements.txt", "pyproject.toml"} <= set(below)
    assert "." not in below


def test_the_image_runs_train_as_another_user_than_root(root):
    names = [name for name, _ in instructions(root)]
    assert names[-2:] == ["USER", "ENTRYPOINT"]
    assert arguments(root, "USER") == ["1000"]
    assert arguments(root, "ENTRYPOINT") == ['["python", "launch/train.py"]']
    variables = dict(part.split("=", 1) for part in shlex.split(" ".join(arguments(root, "ENV"))))
    assert variables["MASKDM_CACHE"].startswith("/cache")
    assert variables["HOME"] == "/cache"
    assert any("mkdir -m 1777 /cache" in text for text in arguments(root, "RUN"))


def test_the_commands_are_valid_shell(root):
    for text in arguments(root, "RUN"):
        subprocess.run(["bash", "-n", "-c", text], check=True)


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("launch/train.py", False),
        ("maskdm_jax/data/digits.npz", False),
        ("configs/demo.py", False),
        ("requirements.txt", False),
        ("maskdm_jax/__pycache__/a.pyc", True),
        ("maskdm_jax/data/__pycache__/a.pyc", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("runs/demo/log.txt", True),
        ("data/key.json", True),
        ("key.json", True),
    ],
)
def test_the_image_holds_code_only(root, path, hidden):
    assert ignored(root, path) == hidden


def jobset(root):
    return yaml.safe_load((root / "launch" / "gke_jobset.yaml").read_text())


# Fields of JobSet v1alpha2, and of the objects of Kubernetes in it, that the file may use: the type of a value, or the
# set of its values. In a mapping with "*", fields may have any name.
ENVIRONMENT = {
    "name": str,
    "value": str,
    "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}},
}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [ENVIRONMENT],
    "resources": {"limits": {"*": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {"*": str},
    "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": {"NoSchedule"}}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": {"Memory"}}}],
}
POD_RULE = {
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
    "onPodConditions": [{"type": str, "status": str}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [POD_RULE]},
    "template": {"spec": POD},
}
RULE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [
        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
    ],
    "onJobFailureMessagePatterns": [str],
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": {"*": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value, schema, path="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        for name, child in value.items():
            assert name in schema or "*" in schema, f"{path} has no field {name}"
            check(child, schema.get(name) or schema["*"], f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for n, child in enumerate(value):
            check(child, schema[0], f"{path}[{n}]")
    elif isinstance(schema, set):
        assert value in schema, f"{path}: {value}"
    else:
        assert type(value) is schema, f"{path}: {value!r}"


def test_the_jobset_has_known_fields(root):
    check(jobset(root), JOBSET)
    wrong = jobset(root)
    wrong["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJob"
    with pytest.raises(AssertionError, match="rules"):
        check(wrong, JOBSET)


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        (ConfigError.status, "FailJobSet"),
        (Preempted.status, "RestartJobSetAndIgnoreMaxRestarts"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "RestartJobSet"),
    ],
)
def test_the_jobset_restarts_by_exit_status(root, failure, action):
    """With the message of the Job controller: `... matching FailJob rule at index 0`."""
    spec = jobset(root)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for n, rule in enumerate(job["podFailurePolicy"]["rules"]):
        conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
        if failure in rule.get("onExitCodes", {}).get("values", []) + conditions:
            reason, message = "PodFailurePolicy", f"Pod default/a failed matching FailJob rule at index {n}"
            break
    found = (
        rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    )
    assert next(found, "RestartJobSet") == action
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_jobset_starts_the_image_on_spot_nodes(root):
    """It writes to the store without a mounted bucket. JAX reads the variables that GKE sets for one or more slices."""
    job = jobset(root)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod, container = job["template"]["spec"], job["template"]["spec"]["containers"][0]
    assert job["parallelism"] == job["completions"]
    assert not any(variable["name"].startswith("JAX_") for variable in container["env"])
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert any(argument.startswith("--workdir=gs://") for argument in container["args"])
    assert "command" not in container, "the image's entry point is launch/train.py"
    assert {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"][:2]} == {"maskdm"}
    assert container["name"] == "maskdm"
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
