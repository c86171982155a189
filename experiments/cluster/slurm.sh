#!/bin/bash
#SBATCH --job-name=retex_offsets
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=00:30:00
# One process a node; JAX finds the others from Slurm's variables. PRETRAINED, EXPERTS and OUT are taken from the environment:
#   sbatch --export=ALL,PRETRAINED=base,EXPERTS="a b c d",OUT=offsets.safetensors experiments/cluster/slurm.sh
set -euo pipefail
# shellcheck disable=SC2086  # EXPERTS are words
srun python experiments/cluster/fit_offsets.py --pretrained="$PRETRAINED" --out="$OUT" --rank="${RANK:-64}" --experts $EXPERTS
