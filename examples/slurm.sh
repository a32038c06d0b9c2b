#!/bin/bash
# Shearling on several nodes of eight GPUs under Slurm, through preemption and time limits, to the end:
#
#   sbatch --nodes=4 examples/slurm.sh recipe.yaml /shared/runs/shear
#
# The recipe, the text, the source and the run directory must lie on a file system that every node sees under the same path.
# prune.microbatches and train.microbatches of the recipe must be multiples of the number of processes, 8 times the nodes.

#SBATCH --job-name=shear
#SBATCH --nodes=2
# One torchrun a node, which starts one process for each of the node's GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# The whole node and all of its memory: process 0 of a node loads a whole fp32 model before it keeps its part.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Wake this script (B: the script alone, not its steps) 300 s before the time limit; it passes the signal on below. The same happens
# before a preemption where the cluster's PreemptParameters has send_user_signal; elsewhere the steps get SIGTERM, and save as well.
#SBATCH --signal=B:USR1@300
# Slurm may put the job back into the queue: after a preemption, after the loss of a node, and when this script asks for it.
#SBATCH --requeue
# A requeued job goes on with the same log instead of emptying it.
#SBATCH --open-mode=append
#SBATCH --output=shear-%j.log

set -u

recipe=${1:?the recipe}
out=${2:?the run directory}
gpus=${GPUS_PER_NODE:-8}

# All torchruns meet at the first node of the job. The port is the job's own, in case another job shares that node.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint=$head:$((20000 + SLURM_JOB_ID % 10000))

# Left out, torchrun sets it to 1, and what process 0 does on the CPU (the cut, the export) takes longer.
export OMP_NUM_THREADS=8

# --kill-on-bad-exit=1: where one node's torchrun fails, Slurm ends the step on the others instead of leaving them to wait.
# --cpus-per-task: srun does not take it over from the lines above by itself.
# --signals-to-handle: torchrun passes SIGUSR1 on to its processes only if it is told to; unasked, it dies of it and leaves them
#   behind. The others are its default.
# --shutdown-timeout: seconds that torchrun waits after a signal before it kills its processes, 30 if left out. They finish the step
#   and save; it must be shorter than the 300 s above.
# --rdzv-id: a requeued job keeps its number, but is another meeting.
srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$gpus" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$endpoint" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout 270 \
    -m shearling run "$recipe" --out "$out" &
step=$!

# srun hands SIGUSR1 to the torchrun of every node. Each process gets it once: a second signal would end it without saving.
stopped=
trap '[ -n "$stopped" ] || { stopped=yes; kill -USR1 "$step"; }' USR1

# The trap runs only while the shell waits (hence the & above) and cuts that short: wait again while srun is there, and in the end once
# more, for its own exit code.
wait "$step"
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
done
wait "$step"
code=$?

# torchrun ends with 1 whether its processes saved and stopped (75 each) or crashed; that they were told to stop is known here. A run
# that was done before it could be stopped ends with 0. A crash is not put back into the queue: look at the log, then sbatch again.
if [ "$code" -ne 0 ] && [ -n "$stopped" ]; then
    echo "stopped by a signal; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
