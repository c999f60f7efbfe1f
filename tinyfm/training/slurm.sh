#!/bin/bash
# A job for Slurm: 4 machines of 8 GPUs train one model.   sbatch tinyfm/training/slurm.sh
#
# Slurm starts one task per machine. Each task is a torchrun, which starts 8 ranks and meets the
# others at the first machine. If a rank dies, torchrun restarts all ranks, and they resume from the
# last checkpoint. Two minutes before the time limit the script puts the job into the queue again.
# Slurm then sends SIGTERM to all ranks, which save a checkpoint if its KillWait gives them time
# for it. The job resumes when its turn comes.
#SBATCH --job-name=llama-1b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
OUT=${OUT:-runs/llama-1b}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=
if compgen -G "$OUT/step-*/manifest.json" > /dev/null; then RESUME=--resume; fi
export OMP_NUM_THREADS=8
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # for machines with several networks

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$FIRST:29500" \
    train.py llama-1b --data.path corpus/ --out "$OUT" \
    --train.parallel fsdp --train.shard-size 8 $RESUME &
wait
