#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120
#
#   sbatch experiments/slurm/train.sh experiment=cifar10 outputs=/a/folder/that/all/nodes/see
#   sbatch --nodes=4 experiments/slurm/train.sh experiment=lsun_bedroom256 outputs=...
#
# A task for each GPU; the tasks find each other by what Slurm tells them. All words go to ddpm.train.
#
# A run knows when its job ends, and stops in time by its own clock; the signal above is for the
# cluster that does not say. Stopped, it saves and exits with 75, "start me again", also when it is
# preempted with a GraceTime, or by `scancel --signal=USR1 JOB`: the job is queued again, and carries
# on. Preempted without a GraceTime it saves within KillWait, and Slurm itself queues it again. A
# preemption that cancels (PreemptMode=CANCEL) without a GraceTime cannot be answered: type sbatch
# again, and the run carries on. `scancel JOB` ends the job for good; the run saves all the same.
# Any other exit code is the job's own: what fails is FAILED.

srun python -m ddpm.train "$@"
code=$?
if [ $code = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this script
fi
exit $code
