"""launch/tpu_vm.sh with a `gcloud` that keeps two hosts as folders, and can be preempted, hang and fail."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from maskdm_jax.errors import ConfigError, Preempted

# In $STUB: state (of the slice), host0, host1 (home folders), calls. A file `hang` or `refuse` contains a verb; the
# next call of that verb hangs or is refused; `after` is then the state. While `dead` exists, no host answers.
GCLOUD = r"""#!/usr/bin/env bash
cd "$STUB" || exit
verb=$4 command= status=0
for argument in "$@"; do case $argument in --command=*) command=${argument#--command=} ;; esac; done
echo "$*" >>calls
if [ "$(cat hang 2>/dev/null)" = "$verb" ]; then rm hang; exec sleep 60; fi
if [ "$(cat refuse 2>/dev/null)" = "$verb" ]; then
  rm refuse; [ ! -e after ] || mv after state; echo "ERROR: refused" >&2; exit 1
fi
case $verb in
  create) echo ACTIVE >state; mkdir host0 host1; echo create >>events ;;
  describe) cat state 2>/dev/null || { echo "ERROR: NOT_FOUND: Resource 'x' was not found" >&2; exit 1; } ;;
  delete)
    for host in host?; do
      [ ! -e $host/maskdm/group ] || kill -KILL -- "-$(cat $host/maskdm/group)" 2>/dev/null
    done
    rm -rf host? state dead; echo delete >>events ;;
  scp)
    for file in "${@:5}"; do
      for host in host?; do [ ! -f "$file" ] || cp "$file" $host/maskdm/ || status=1; done
    done ;;
  ssh)
    [ -e host0 ] && [ ! -e dead ] || exit 255
    for host in host?; do HOME=$STUB/$host PATH=$STUB/bin:$PATH bash -c "cd; $command" || status=1; done ;;
esac
exit $status
"""
# A host's python3: `-m pip install --target=uv` makes a uv whose virtual environment has $STUB/program for a Python.
PYTHON = r"""#!/usr/bin/env bash
echo "install $*" >>"$STUB/installs"; cat uv.txt >>"$STUB/installs"
mkdir -p uv/bin
cat >uv/bin/uv <<'UV'
#!/usr/bin/env bash
echo "uv $*" >>"$STUB/installs"
[ "$1" != venv ] || { mkdir -p "${@: -1}/bin"; ln -s "$STUB/program" "${@: -1}/bin/python"; }
UV
chmod +x uv/bin/uv
"""
# $attempt counts the starts of this host, over all slices; $host is 0 or 1.
PROGRAM = r"""#!/usr/bin/env bash
host=${HOME: -1}
echo "$*" >>"$STUB/starts$host"
attempt=$(wc -l <"$STUB/starts$host")
echo "host $host, start $attempt"
env >"$STUB/environment$host"
on_term() { trap "exit $1" TERM; while true; do sleep 0.05; done; }
"""


RUN = ("run", "x", "launch/train.py", "--config=configs/demo.py", "--workdir=gs://bucket/a run")
FOREVER = "on_term 75"


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def checkout(root, tmp_path_factory):
    """A repository that holds the script alone."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "launch").mkdir()
    shutil.copy(root / "launch" / "tpu_vm.sh", folder / "launch")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    return folder


class Tpu:
    """Calls of launch/tpu_vm.sh, and files of the stub."""

    def __init__(self, script, folder):
        self.folder, self.script = folder, script
        (folder / "bin").mkdir()
        write(folder / "bin" / "gcloud", GCLOUD)
        write(folder / "bin" / "python3", PYTHON)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = os.environ | dict(PATH=path, STUB=str(folder), ZONE="z", TYPE="v5litepod-8")
        self.environment |= dict(POLL="0.1", PAUSE="0", ANSWER="2", RESTARTS="3")

    def __call__(self, *args, **variables):
        with self.start(*args, **variables) as process:
            process.out, process.err = process.communicate(timeout=60)
        return process

    def start(self, *args, **variables):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        return subprocess.Popen(["bash", str(self.script), *args], env=self.environment | variables, **pipes)

    def program(self, text):
        write(self.folder / "program", PROGRAM + text)

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def starts(self):
        return len(self.lines("starts0")), len(self.lines("starts1"))

    def states(self):
        return [line.split(": ")[1] for line in self("status", "x").out.splitlines()]


@pytest.fixture
def tpu(checkout, tmp_path):
    tpu = Tpu(checkout / "launch" / "tpu_vm.sh", tmp_path)
    yield tpu
    tpu("delete", "x")


def test_a_run_is_created_installed_and_done(tpu, tmp_path):
    """Both hosts get the arguments, the code and the credentials, which nothing shows; nothing is installed twice."""
    tpu.program("exit 0")
    (tmp_path / "key.json").write_text("of a service account")
    secrets = dict(WANDB_API_KEY="se'c ret1", AWS_SECRET_ACCESS_KEY="secret2")
    done = tpu(*RUN, **secrets, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert done.returncode == 0, done.err
    assert tpu.lines("starts0") == tpu.lines("starts1") == [" ".join(RUN[2:])]
    assert "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot" in tpu.lines("calls")[1]
    assert "--node-id=x" in tpu.lines("calls")[1]
    for host in (tmp_path / "host0", tmp_path / "host1"):
        files = host / "maskdm"
        assert (files / "code" / "launch" / "tpu_vm.sh").exists()
        assert (files / "credentials.json").read_text() == "of a service account"
        assert files.stat().st_mode & 0o777 == 0o700
        assert all((files / name).stat().st_mode & 0o077 == 0 for name in ("environment", "credentials.json"))
    environment = tpu.lines("environment1")
    assert {f"{name}={value}" for name, value in secrets.items()} <= set(environment)
    assert f"GOOGLE_APPLICATION_CREDENTIALS={tmp_path}/host1/maskdm/credentials.json" in environment
    assert any(line.startswith("LIBTPU_INIT_ARGS=--xla") for line in environment)
    shown = done.out + done.err + "".join(tpu.lines("calls"))
    assert not any(value[-6:] in shown for value in ("secret2", "se'c ret1", "of a service account"))
    assert "the slice costs money until you delete it" in done.err

    installs = tpu.lines("installs")
    assert sum("--require-hashes" in line for line in installs) == 2
    assert sum("uv==" in line and "--hash=sha256:" in line for line in installs) == 2
    assert sum("-e .[tpu,gcs,s3,parquet,wandb]" in line for line in installs) == 2
    assert tpu("status", "x").out.splitlines()[0] == "slice x: ACTIVE"
    assert tpu.states() == ["ACTIVE", "0", "0"]
    again = tpu("run", "x", "launch/sample.py", DELETE="yes")
    assert again.returncode == 0
    assert tpu.lines("starts0")[1:] == ["launch/sample.py"]
    assert tpu.lines("installs") == installs
    assert not (tmp_path / "state").exists()


def test_failures_are_started_again(tpu):
    """The hosts that wait for one that failed are stopped; the number of failures is limited."""
    tpu.program('[ "$host$attempt" = 11 ] && exit 1; [ "$attempt" = 1 ] && on_term 1; exit 0')
    done = tpu(*RUN)
    assert done.returncode == 0, done.err
    assert tpu.starts() == (2, 2)
    assert "the program failed (failure 1); next attempt in 0 s" in done.err
    tpu.program("exit 3")
    done = tpu(*RUN)
    assert done.returncode == 1
    assert tpu.starts() == (2 + 4, 2 + 4)
    assert "given up after 4 failures" in done.err


def test_a_configuration_error_ends_all(tpu):
    tpu.program('[ "$host" = 1 ] && { echo "error: no such key"; exit 78; }; ' + FOREVER)
    done = tpu(*RUN)
    assert done.returncode == ConfigError.status, done.err
    assert tpu.starts() == (1, 1)
    assert tpu.states() == ["ACTIVE", "75", "78"]
    assert "a setting is wrong" in done.err
    assert ": error: no such key" in done.out


def test_a_preempted_slice_is_replaced(tpu):
    """Preemptions, also those after which the run saved (75), do not count as failures."""
    preempted = f"[ $host = 1 ] && {{ echo SUSPENDED >$STUB/state; exit 75; }}; {FOREVER}"
    tpu.program(f"[ $attempt -gt 2 ] && exit 0; {preempted}")
    done = tpu(*RUN, RESTARTS="0", DELETE="1")
    assert done.returncode == 0, done.err
    assert tpu.lines("events") == ["create", "delete"] * 3
    assert 3 <= tpu.starts()[0] <= 6


@pytest.mark.parametrize(
    ("fault", "verb"),
    [("hang", "describe"), ("hang", "ssh"), *(("refuse", verb) for verb in ("ssh", "scp", "delete", "create"))],
)
def test_gcloud_hangs_or_fails(tpu, fault, verb):
    """While a preempted slice is replaced."""
    tpu.program(
        f"[ $attempt -gt 1 ] && exit 0; [ $host = 1 ] || on_term 75; echo {verb} >$STUB/{fault}; "
        "echo SUSPENDED >$STUB/state; on_term 75"
    )
    done = tpu(*RUN)
    assert done.returncode == 0, done.err
    assert not (tpu.folder / fault).exists()
    assert tpu.starts() == (2, 2)


def test_hosts_that_no_longer_answer_are_replaced(tpu):
    tpu.program(f"[ $attempt -gt 1 ] && exit 0; {FOREVER}")
    with tpu.start(*RUN, SILENT="3", RESTARTS="0", SSH_FLAGS="--tunnel-through-iap") as run:
        wait_for(lambda: tpu.states() == ["ACTIVE", "running", "running"])
        (tpu.folder / "dead").touch()
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "the hosts do not answer (3)" in errors
    assert tpu.lines("events") == ["create", "delete", "create"]
    for verb in ("scp", "ssh x"):
        assert any(f" {verb}" in call and "--worker=all --tunnel-through-iap" in call for call in tpu.lines("calls"))


def test_a_deletion_that_takes_its_time(tpu):
    """It is refused once, goes on by itself, and the slice is then requested anew."""
    tpu.program(f"[ $attempt -gt 1 ] && exit 0; {FOREVER}")
    with tpu.start(*RUN) as run:
        wait_for(lambda: tpu.starts() == (1, 1))
        (tpu.folder / "after").write_text("DELETING")
        (tpu.folder / "refuse").write_text("delete")
        (tpu.folder / "state").write_text("SUSPENDED")
        wait_for(lambda: not (tpu.folder / "after").exists())
        calls = len(tpu.lines("calls"))
        wait_for(lambda: len(tpu.lines("calls")) > calls + 3)
        for host in ("host0", "host1"):
            os.killpg(int((tpu.folder / host / "maskdm" / "group").read_text()), signal.SIGKILL)
            shutil.rmtree(tpu.folder / host)
        (tpu.folder / "state").unlink()
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "waiting for the slice: DELETING" in errors
    assert tpu.lines("events") == ["create", "create"]


def test_a_request_that_is_refused_at_once_ends_the_run(tpu):
    (tpu.folder / "refuse").write_text("create")
    done = tpu(*RUN)
    assert (done.returncode, tpu.lines("events")) == (1, [])
    assert "ERROR: refused" in done.err
    (tpu.folder / "refuse").write_text("describe")
    done = tpu(*RUN)
    assert (done.returncode, tpu.lines("events")) == (1, [])


@pytest.mark.parametrize(("end", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_program_outlives_the_connection(tpu, end, status):
    """The same command watches it again."""
    tpu.program('until [ -e "$STUB/go" ]; do sleep 0.05; done')
    with tpu.start(*RUN) as first:
        wait_for(lambda: tpu.starts() == (1, 1))
        wait_for(lambda: (tpu.folder / "calls").read_text().count("host_state") > 3)
        os.killpg(first.pid, end)
        first.communicate()
    assert first.returncode == status
    assert tpu.states() == ["ACTIVE", "running", "running"]
    other = tpu("run", "x", "launch/train.py", "--config=configs/own_images.py")
    assert other.returncode == 1
    assert "another program runs; end it first" in other.err
    with tpu.start(*RUN) as second:
        assert "a program runs already; watching it" in next(line for line in second.stderr if "x:" in line)
        (tpu.folder / "go").touch()
        second.stderr.read()
    assert second.returncode == 0
    assert tpu.starts() == (1, 1)


def test_stop_saves_and_is_not_undone(tpu):
    tpu.program("echo $attempt; " + FOREVER)
    with tpu.start(*RUN) as run:
        wait_for(lambda: tpu.starts() == (1, 1))
        assert tpu("stop", "x").returncode == 0
        run.communicate()
    assert run.returncode == Preempted.status
    assert tpu.starts() == (1, 1)
    assert tpu.states() == ["ACTIVE", "stopped", "stopped"]
    assert [(tpu.folder / host / "maskdm" / "status").read_text() for host in ("host0", "host1")] == ["75\n", "75\n"]
    with tpu.start(*RUN) as run:
        wait_for(lambda: tpu.starts() == (2, 2))
        tpu("delete", "x")
        _, errors = run.communicate()
    assert run.returncode == 1
    assert "the slice was deleted" in errors
    assert tpu.lines("events") == ["create", "delete"]


def test_several_slices_and_other_flags(tpu):
    assert tpu("create", "x", SLICES="2", TYPE="v6e-16", CREATE_FLAGS="--reserved --network=n").returncode == 0
    call = tpu.lines("calls")[-1]
    assert "--node-prefix=x --node-count=2" in call
    assert "--runtime-version=v2-alpha-tpuv6e --reserved --network=n" in call
    assert "--spot" not in call
    tpu("create", "x", CREATE_FLAGS="")
    assert "--spot" not in tpu.lines("calls")[-1]
    (tpu.folder / "refuse").write_text("ssh")
    tpu("logs", "x", "3", "1")
    assert "ssh x --zone=z --node=1 --worker=3 --command=tail" in tpu.lines("calls")[-1]


@pytest.mark.parametrize("args", [(), ("run", "x"), ("go", "x")])
def test_usage(tpu, args):
    done = tpu(*args)
    assert done.returncode == 2
    assert "launch/tpu_vm.sh run NAME launch/train.py" in done.err
    assert "set -euo" not in done.err
