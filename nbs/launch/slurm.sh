#!/usr/bin/env bash
# sbatch nbs/launch/slurm.sh finetune --model MODEL --data rows.jsonl --output-dir SHARED_FOLDER
# One torchrun on each node; the first node is where they meet. Change the three lines below.
# --output-dir is a folder that all nodes see.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
set -euo pipefail

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
port=$((20000 + SLURM_JOB_ID%10000))   # two jobs on one node do not meet
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
     --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:$port" -m qlora_nb.apps.cli "$@"
