#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120
#
#   sbatch experiments/slurm/torchrun.sh experiment=lsun_bedroom256 outputs=/a/folder/that/all/nodes/see
#
# Like train.sh, but through torchrun, which train.sh does not need. Each node runs one torchrun,
# which starts one process per GPU (PER_NODE=2 sbatch ... starts two). All arguments go to
# ddpm.train.
#
# torchrun kills its processes 30 s after a signal, whatever Slurm grants, so it ignores the signals
# here and only the processes handle them. It turns every exit code into 1; the original code is in
# the error file that it writes for its parent. Its traceback after our last line is unavoidable.

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD="$head:$((10000 + SLURM_JOB_ID % 20000))" PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # seconds that the other processes get once one has exited

on_each_node() {
    trap '' TERM INT USR1
    folder=$(mktemp -d)
    export TORCHELASTIC_ERROR_FILE=$folder/error.json
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$PER_NODE" --signals-to-handle SIGHUP \
        --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$SLURM_JOB_ID" -m ddpm.train "$@"
    code=$?
    grep -qs '"errorCode": 75' "$TORCHELASTIC_ERROR_FILE" && code=75
    rm -r "$folder"
    exit $code
}
export -f on_each_node

srun bash -c 'on_each_node "$@"' torchrun "$@"
code=$?
if [ $code = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this script
fi
exit $code
