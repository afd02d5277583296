#!/usr/bin/env bash
# Run a program on every host of a TPU VM slice, and restart it after a failure or preemption of a host.
#
#   launch/tpu_vm.sh NAME ZONE launch/train.py --config=configs/celebahq.py --workdir=/mnt/shared/runs/celebahq
#
# The committed state of this repository is copied to the hosts and installed there, once per commit. The run folder must
# be on a disk that all hosts see: Filestore, or a bucket mounted by gcsfuse. When a host fails, the others notice within
# two minutes and end; then all are restarted after a pause, RESTARTS times (default 100); not after wrong settings (exit
# status 78). Create the slice first:
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,5p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."
commit=$(git rev-parse --short HEAD)
folder=maskdm-jax-$commit
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix="$folder/" -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:$folder.tar.gz" --zone="$zone" --worker=all
on_all "test -e $folder/.installed || (tar xzf $folder.tar.gz && cd $folder && python3 -m venv .venv &&
  .venv/bin/pip install -q -r requirements.txt && .venv/bin/pip install -q \"jax[tpu]==\$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version(\"jax\"))')\" && touch .installed)"

# Overlap collectives with computation.
flags="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
for attempt in $(seq 0 "${RESTARTS:-100}"); do
  status=0
  run="LIBTPU_INIT_ARGS='$flags' .venv/bin/python $(printf '%q ' "$@")"
  on_all "cd $folder && rm -f .status && $run; echo \$? > .status; exit \$(cat .status)" || status=$?
  [ "$status" -eq 0 ] && exit 0
  if on_all "cat $folder/.status" | grep -qx 78; then
    exit 78
  fi
  echo "ended with status $status; start $((attempt + 2))" >&2
  on_all "pkill -9 -f '^.venv/bin/python launch/' || true" || sleep 60 # hosts that are being replaced do not answer
  sleep $((attempt < 30 ? 10 * attempt : 300))
done
exit "$status"
