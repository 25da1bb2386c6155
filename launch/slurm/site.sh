# What is particular to your cluster. Edit this file, nothing else: launch/slurm/submit.sh asks SLURM for what stands
# here, and every job reads it. Another file: CPREC_SITE=path launch/slurm/submit.sh ...

# --- what to ask for, as options of sbatch -----------------------------------------------------------------------------
EVERY_JOB=()                                        # e.g. (--account=myproject --qos=normal)
PREPARING=(--nodes=4 --ntasks-per-node=16 --cpus-per-task=1 --mem=0 --time=24:00:00)     # e.g. --partition=cpu
TRAINING=(--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --mem=0 --time=24:00:00 --exclusive)
ANNEALING=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --mem=0 --time=24:00:00 --exclusive)
RANKING=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --mem=0 --time=12:00:00)
EXPORTING=(--nodes=1 --ntasks=1 --cpus-per-task=8 --mem=64G --time=4:00:00)
WARN_S=300          # how long before its time limit a job is told to save: longer than a step and a checkpoint take
MAX_REQUEUES=50     # a job that has come back so often stays away

# --- what a job runs in: a virtual environment, or a container ---------------------------------------------------------
VENV=${VENV:-.venv}                                 # used where CONTAINER is empty
CONTAINER=                                          # pyxis: an image or .sqsh file; apptainer: a .sif file
CONTAINER_TOOL=pyxis                                # pyxis or apptainer
CONTAINER_MOUNTS=("$PWD")                           # folders seen inside under the same path
MPI=pmi2                                            # of preparation: what `srun --mpi=list` offers and mpi4py was built for

prepare_node() {                                    # runs at the start of every job
    : # module load cuda/13.0
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0          # the interface between nodes, see `ip addr`
    # export NCCL_DEBUG=WARN HF_HUB_OFFLINE=1
}
