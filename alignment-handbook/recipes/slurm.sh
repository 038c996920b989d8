#!/bin/bash
# Several nodes under Slurm: one `accelerate launch` on each, which starts a process for each GPU.
#
#   sbatch --nodes=2 --gpus-per-node=8 alignment-handbook/recipes/slurm.sh CONFIG SCRIPT RECIPE [--key=value ...]
#   sbatch --nodes=2 --gpus-per-node=8 alignment-handbook/recipes/slurm.sh fsdp2_qlora \
#       run_reward.py yamls/reward_70b.yaml
#
# CONFIG is a file of accelerate_configs/ by its name: multi_node (DDP), fsdp2, fsdp2_qlora, fsdp2_offload,
# deepspeed_zero2 or deepspeed_zero3. Submitted from the repository's root. A recipe that runs for hours should save often (save_strategy:
# steps, save_steps): a job that is queued again resumes from the newest complete checkpoint.
#SBATCH --job-name=alignment
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@90
#SBATCH --open-mode=append
# --requeue: preempted, or after a node's death, the job is queued again, and its log is appended to.
# --signal: 90 s before the time limit the run is told to save a checkpoint and end.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
export PATH="$PWD/.venv/bin:$PATH"
config="alignment-handbook/recipes/accelerate_configs/$1.yaml" script=$2 recipe=$3
shift 3

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=(
    accelerate launch --config_file "$config" --num_machines="$SLURM_NNODES"
    --num_processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
    --main_process_ip="${nodes[0]}" --main_process_port=$((20000 + SLURM_JOB_ID % 10000))
)
# The rank is known on the node alone. exec: the signal reaches accelerate itself.
srun --kill-on-bad-exit=1 bash -c 'exec "${@:2:$1}" --machine_rank="$SLURM_NODEID" "${@:$1 + 2}"' bash \
    ${#launch[@]} "${launch[@]}" "$script" "$recipe" --resume_from_checkpoint=true "$@"
