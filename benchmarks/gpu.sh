#!/usr/bin/env bash
# What one GPU shows in ten minutes: benchmarks/gpu.sh [--record]; see gpu.py.
cd "$(dirname "$0")/.." && exec python benchmarks/gpu.py "$@"
