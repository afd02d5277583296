#!/usr/bin/env bash
# Run a program on Cloud TPU VMs, one process per host, and recreate the slice after preemptions. See docs/tpu.md.
#
#   export ZONE=us-west4-a TYPE=v5litepod-16
#   launch/tpu_vm.sh create NAME           request a spot slice; returns at once
#   launch/tpu_vm.sh run NAME launch/train.py --config=configs/celebahq.py --workdir=gs://BUCKET/runs/celebahq
#   launch/tpu_vm.sh status NAME           state of the slice, and of the program on every host
#   launch/tpu_vm.sh logs NAME [HOST] [SLICE]   follow the log of a host, by default host 0 of slice 0
#   launch/tpu_vm.sh stop NAME             send SIGTERM, on which a run saves, and wait for the end
#   launch/tpu_vm.sh delete NAME           delete the slice, which costs money until then
#
# `run` creates the slice if it does not exist, waits for it, copies the committed state of this repository, and installs
# it with a Python of its own. The program is detached: a lost connection does not end it, and the same `run` command
# watches it again. While `run` watches, it starts the program again after failures and preemptions, but not after a
# configuration error (exit status 78). It ends with status 0 (done), 75 (`stop`), 78, or 1 (another error).
#
# Further variables, with their defaults:
#   SLICES=1                number of slices
#   CREATE_FLAGS=--spot     flags of `gcloud compute tpus queued-resources create`; empty: not preemptible
#   RUNTIME                 software version of the TPU VM, by default after TYPE
#   DELETE=                 any text: delete the slice when `run` ends with status 0, 75 or 78
#   RESTARTS=100 PAUSE=10   starts after failures, and the seconds by which each pause is longer than the previous one
#   POLL=30 ANSWER=120      seconds between two looks at the hosts, and until they count as not answering
#   SILENT=20               looks without an answer after which the slice is replaced
#   SSH_FLAGS               flags of `gcloud ... ssh` and `scp`, such as --tunnel-through-iap for hosts of --internal-ips
# The hosts receive the variables of CREDENTIALS below and the file $GOOGLE_APPLICATION_CREDENTIALS, in files that only
# you can read.
set -euo pipefail

UV="uv==0.13.9 --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19" # x86-64
PYTHON=3.11
CREDENTIALS="WANDB_API_KEY WANDB_ENTITY HF_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION
  AWS_DEFAULT_REGION AWS_ENDPOINT_URL"
# Overlap collectives with computation.
FLAGS="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"

say() { echo "$(date +%H:%M:%S) $name: $*" >&2; }

# tpu SECONDS VERB [ARGUMENT...]: gcloud on the queued resource, with a time limit. Ctrl-C interrupts `wait` at once.
tpu() {
  timeout -k 10 "$1" gcloud compute tpus queued-resources "${@:2}" --zone="$ZONE" --quiet </dev/null &
  wait $!
}

# on_all SECONDS FUNCTION [ARGUMENT...]: one of the functions below on all hosts of all slices.
on_all() {
  tpu "$1" ssh "$name" --node=all --worker=all "${ssh_flags[@]}" \
    --command="$(declare -f "$2"); $(printf '%q ' "${@:2}")"
}

# ---- on a host, in ~/maskdm

host_folder() { # remove the marks of the last program; fails while one runs
  mkdir -p ~/maskdm && chmod 700 ~/maskdm && cd ~/maskdm && flock --nonblock lock rm -f pid status stopped
}

host_install() { # COMMIT UV PYTHON: install the code with a Python of its own, once per commit
  set -e
  cd ~/maskdm
  exec 8>install.lock && flock --wait 1500 8 # a connection that was lost may have left an installation behind
  if [ ! -e "$1/.installed" ]; then
    rm -rf "$1" uv
    tar xzf "$1.tar.gz"
    echo "$2" >uv.txt
    python3 -m pip install --quiet --target=uv --require-hashes --requirement=uv.txt
    uv/bin/uv venv --quiet --python="$3" "$1/.venv"
    (cd "$1" && VIRTUAL_ENV=.venv ../uv/bin/uv pip install --quiet -r requirements.txt -e ".[tpu,gcs,s3,parquet,wandb]")
    touch "$1/.installed"
  fi
  ln -sfn "$1" code
}

host_start() { # [ARGUMENT...]: start Python with these arguments, detached from this connection
  cd ~/maskdm || return
  # The lock is held as long as Python or one of its children lives.
  setsid nohup bash -c '
    exec 9>lock && flock --wait 10 9 || exit
    echo "$*" >command
    echo $$ >group && source ./environment && cd code || exit
    .venv/bin/python "$@" &
    echo $! >../pid
    wait $!
    echo $? >../status' maskdm "$@" >>log 2>&1 </dev/null &
  for _ in $(seq 100); do [ -e pid ] && return; sleep 0.1; done
  return 1
}

host_state() { # [ARGUMENT...]: print host NAME: new | running | another (program runs) | stopped | lost | the exit status
  state=new
  if cd ~/maskdm 2>/dev/null && [ -e lock ]; then
    state=lost
    [ ! -s status ] || state=$(cat status)
    [ ! -e stopped ] || state=stopped
    if ! flock --nonblock lock true; then
      state=running
      [ $# -eq 0 ] || [ "$(cat command)" = "$*" ] || state=another
    fi
  fi
  echo "host $(hostname): $state"
}

host_log() { sed "s/^/$(hostname): /" < <(tail -n 3 ~/maskdm/log); }

host_stop() { # [stopped]: SIGTERM, and SIGKILL after three minutes; the mark makes `run` end
  cd ~/maskdm 2>/dev/null || return 0
  [ -z "${1:-}" ] || touch "$1"
  flock --nonblock lock true && return
  kill -TERM "$(cat pid)" || true
  flock --wait 180 lock true || kill -KILL -- "-$(cat group)"
}

# ---- here

# The state of the queued resource, such as ACTIVE; NONE if there is none; UNKNOWN if gcloud does not answer.
slice_state() {
  local answer
  if answer=$(tpu "$ANSWER" describe "$name" --format="value(state.state)" 2>&1); then
    tail -n 1 <<<"$answer"
  elif grep -q NOT_FOUND <<<"$answer"; then
    echo NONE
  else
    echo "${answer:-gcloud does not answer}" >&2
    echo UNKNOWN
  fi
}

create() {
  local runtime nodes=(--node-id="$name") flags
  : "${TYPE:?set it to an accelerator type, such as v5litepod-16}"
  case $TYPE in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
  [ "${SLICES:-1}" -eq 1 ] || nodes=(--node-prefix="$name" --node-count="$SLICES")
  read -ra flags <<<"${CREATE_FLAGS---spot}"
  tpu 1200 create "$name" "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$runtime}" \
    "${flags[@]}"
}

delete() { tpu 1200 delete "$name" --force; }

# Put the code and the environment of the program into the folder $pack.
make_pack() {
  umask 077
  mkdir -p ~/.cache && pack=$(mktemp -d ~/.cache/maskdm.XXXXXX) # /tmp may be emptied in a run of weeks
  trap 'rm -rf "$pack"' EXIT
  commit=$(git rev-parse --short HEAD)
  git diff --quiet HEAD || say "uncommitted changes are not copied to the hosts"
  git archive --format=tar.gz --prefix="$commit/" -o "$pack/$commit.tar.gz" HEAD
  {
    printf 'export LIBTPU_INIT_ARGS=%q\n' "$FLAGS"
    for variable in $CREDENTIALS; do
      [ -z "${!variable:-}" ] || printf 'export %s=%q\n' "$variable" "${!variable}"
    done
    if [ -n "${GOOGLE_APPLICATION_CREDENTIALS:-}" ]; then
      cp "$GOOGLE_APPLICATION_CREDENTIALS" "$pack/credentials.json"
      echo 'export GOOGLE_APPLICATION_CREDENTIALS=~/maskdm/credentials.json'
    fi
  } >"$pack/environment"
}

start() {
  say "installing commit $commit on all hosts, and starting $*"
  started=yes
  on_all "$ANSWER" host_folder &&
    tpu 600 scp "$pack"/* "$name:maskdm/" --node=all --worker=all "${ssh_flags[@]}" &&
    on_all 1800 host_install "$commit" "$UV" "$PYTHON" &&
    on_all "$ANSWER" host_start "$@" && return
  started=""
  failure "the hosts could not be set up"
}

failure() {
  failures=$((failures + 1))
  [ "$failures" -le "${RESTARTS:-100}" ] || finish 1 "$*; given up after $failures failures"
  local pause=$((failures * ${PAUSE:-10}))
  say "$* (failure $failures); next attempt in $((pause < 300 ? pause : 300)) s"
  sleep "$((pause < 300 ? pause : 300))"
}

finish() { # STATUS MESSAGE
  say "${*:2}"
  if [ -n "${DELETE:-}" ] && [ "$1" -ne 1 ]; then
    delete
  else
    say "the slice costs money until you delete it: launch/tpu_vm.sh delete $name"
  fi
  exit "$1"
}

# Request another slice in place of the one that was lost.
replace() {
  slice=lost started="" silent=0
  if delete && create; then slice=exists; else failure "no slice could be requested"; fi
}

# Start the program if it does not run, and act on how it ended.
attend() {
  local answer states
  if ! answer=$(on_all "$ANSWER" host_state "$@" 2>&1); then
    silent=$((silent + 1))
    say "the hosts do not answer ($silent): $(tail -n 1 <<<"$answer")"
    [ "$silent" -lt "${SILENT:-20}" ] || replace
    return
  fi
  silent=0
  states=$(sed -n 's/^host [^ ]*: //p' <<<"$answer" | sort -u | tr '\n' ' ')
  if [[ " $states" == *" another "* ]]; then
    say "another program runs; end it first: launch/tpu_vm.sh stop $name"
    exit 1
  fi
  if [ -z "$started" ]; then
    [[ " $states" == *" running "* ]] || { start "$@" && return; }
    say "a program runs already; watching it"
    started=yes
  fi
  case " $states" in
    " running " | " 0 running " | *" running stopped ") ;; # some may still save
    " 0 ") finish 0 "done" ;;
    *" stopped "*) finish 75 "stopped" ;;
    *" 78 "*)
      on_all 300 host_stop || true
      on_all "$ANSWER" host_log || true
      finish 78 "a setting is wrong, so that starting again is of no use"
      ;;
    *)
      say "the program ended; states of the hosts: $states"
      on_all 300 host_stop || true # hosts that wait for one that failed
      if grep -qvxE "0|75|new|lost|running" <<<"${states// /$'\n'}0"; then
        on_all "$ANSWER" host_log || true
        failure "the program failed"
      fi
      start "$@"
      ;;
  esac
}

run() {
  local state slice=""
  started="" failures=0 silent=0
  make_pack
  trap 'say "no longer watching; the program goes on"; exit 130' INT
  while true; do
    state=$(slice_state)
    case $state in
      ACTIVE)
        slice=exists
        attend "$@"
        ;;
      SUSPENDED | FAILED)
        say "the slice was preempted or could not be created ($state); requesting another one"
        [ "$state" = SUSPENDED ] || {
          tpu "$ANSWER" describe "$name" --format="value(state.failedData.error.message)" >&2 || true
          failure "the request for a slice failed"
        }
        replace
        ;;
      NONE)
        [ "$slice" != exists ] || { say "the slice was deleted"; exit 1; }
        if create; then slice=exists; elif [ "$slice" = lost ]; then failure "no slice could be requested"; else exit 1; fi
        ;;
      UNKNOWN) [ -n "$slice" ] || exit 1 ;;
      DELETING | SUSPENDING) say "waiting for the slice: $state" ;;
      *)
        slice=exists
        say "waiting for the slice: $state"
        ;;
    esac
    sleep "$POLL"
  done
}

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 2 ] || usage
command -v gcloud >/dev/null || { echo "gcloud is not installed: https://cloud.google.com/sdk/docs/install" >&2; exit 1; }
: "${ZONE:?set it to the zone of the TPUs, such as us-west4-a}"
verb=$1 name=$2 POLL=${POLL:-30} ANSWER=${ANSWER:-120}
read -ra ssh_flags <<<"${SSH_FLAGS:-}"
shift 2
cd "$(dirname "$0")/.."
case $verb in
  create) create ;;
  delete) delete ;;
  run)
    [ $# -ge 1 ] || usage
    : "${TYPE:?set it to an accelerator type, such as v5litepod-16, for a slice that must be requested}"
    run "$@"
    ;;
  status)
    echo "slice $name: $(slice_state)"
    on_all "$ANSWER" host_state
    ;;
  logs)
    gcloud compute tpus queued-resources ssh "$name" --zone="$ZONE" --node="${2:-0}" --worker="${1:-0}" \
      --command="tail -n 100 -F maskdm/log" "${ssh_flags[@]}"
    ;;
  stop) on_all 300 host_stop stopped ;;
  *) usage ;;
esac
