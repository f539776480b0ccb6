#!/usr/bin/env bash
# One GPU, one command, at most 7 minutes: the tests marked `gpu`, then decode, prefill and training figures, one table last.
# Needs torch with CUDA and pytest; neither network nor an installed puna.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 benchmarks/gpu.py "$@"
