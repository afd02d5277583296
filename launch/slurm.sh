#!/usr/bin/env bash
# Run a program on GPUs under SLURM, one task per GPU, and requeue it after time limits and preemptions.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh launch/train.py --config=configs/celebahq.py \
#     --workdir=/shared/runs/celebahq
#
# The repository, its .venv (make .venv/.installed, then .venv/bin/pip install -e ".[cuda]") and the run folder must be on
# a disk that all nodes see. Every task sees all GPUs of its node and uses the one with its local rank.
#SBATCH --job-name=maskdm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit
# Overlap the reduction of gradients with computation.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# srun returns the highest status, but a task's signal before any status: tasks that a failure of another one ends by
# SIGTERM must not hide its 78.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'trap : TERM; .venv/bin/python "$@"; s=$?; exit $((s > 128 ? 1 : s))' maskdm "$@"
status=$?
# 0: done. 75: saved after SIGTERM. 78: wrong settings, which a restart would only repeat. Others: again, ten times.
failures=.slurm-$SLURM_JOB_ID.failures
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ] && [ "$status" -ne 78 ]; then
  echo "$status" >>"$failures"
  [ "$(wc -l <"$failures")" -gt 10 ] || { sleep 30 && scontrol requeue "$SLURM_JOB_ID"; }
fi
exit "$status"
