#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120
#
#   sbatch experiments/slurm/train.sh experiment=cifar10 outputs=/a/folder/that/all/nodes/see
#   sbatch --nodes=4 experiments/slurm/train.sh experiment=lsun_bedroom256 outputs=...
#
# One task per GPU; the tasks find each other by Slurm's variables. All arguments go to ddpm.train.
#
# A run knows when its job ends and stops in time by its own clock; the signal above is for clusters
# that do not say. Out of time, preempted with a GraceTime, or stopped by
# `scancel --signal=USR1 JOB`, the run saves and exits with 75 ("start me again"). This script then
# requeues the job, and the run resumes. Preempted without a GraceTime, the run saves within
# KillWait, and Slurm itself requeues the job. Preemption that cancels (PreemptMode=CANCEL) without
# a GraceTime does not requeue it: submit it again, and the run resumes. `scancel JOB` ends the job
# for good; the run still saves. Any other exit code is passed on, so failures are FAILED.

srun python -m ddpm.train "$@"
code=$?
if [ $code = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this script
fi
exit $code
