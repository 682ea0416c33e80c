#!/bin/bash
#SBATCH --job-name=smol
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue --open-mode=append
#
# One process for each GPU: 4 x 8 of them. Five minutes before its time is over SLURM sends SIGTERM, upon which the run
# saves and ends with 143; the job is then queued again and goes on. So it does after a node was lost.
#
#     sbatch docs/cluster/slurm.sh --run-dir "$SCRATCH/smol"

source .venv/bin/activate
srun --kill-on-bad-exit=1 python -m train.flax_main --preset smol-774m --mesh data=4,fsdp=8 --batch-size 256 "$@"
code=$?
if [ $code -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
