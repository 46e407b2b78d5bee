#!/usr/bin/env bash
# How fast vdit is on one NVIDIA GPU: see tools/bench_gpu.py, whose flags these are.
#
#   tools/bench_gpu.sh                       the whole of it, about ten minutes
#   tools/bench_gpu.sh --dry                 the same programs at a small size, on any machine
#   PYTHON=/opt/jax/bin/python tools/bench_gpu.sh
#
# Needs jax, flax, optax, einops and numpy, which a CUDA image of JAX has, and no installation.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.bench_gpu "$@"
