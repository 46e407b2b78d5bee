#!/usr/bin/env bash
# A run on GPUs under Slurm, one process a GPU; JAX finds the others by Slurm's environment.
#
#     sbatch --nodes=2 tools/slurm.sh --config=experiments/base.py --workdir=/shared/runs/base
#
# Five minutes before the time is over Slurm asks to stop: the run saves, exits with 143, and is
# queued again. The workdir must be on a file system that all nodes share.
#SBATCH --job-name=vdit
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
srun --gpu-bind=none --label "${VDIT_PYTHON:-.venv/bin/python}" -m vdit.main "$@"
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
