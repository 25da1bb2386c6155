# What the jobs have in common; a template reads it first, in the folder that it was submitted from.
#
# `ranks SCRIPT ARGUMENTS` starts a script with one rank per task, `one` in a single process; `leave CODE` ends the job
# as a run's exit code says: 75 (told to stop, has saved) and 76 (hung) put it back into the queue.
source "${CPREC_SITE:-launch/slurm/site.sh}"
prepare_node
restarts=${SLURM_RESTART_COUNT:-0}
nodes=${SLURM_NNODES:-1}
echo "$(date '+%F %T') job ${SLURM_JOB_ID:-}: start $((restarts + 1)), on ${SLURM_JOB_NODELIST:-this machine}"

# A killed build leaves a lock behind, for which every later start would wait: a folder for this start alone.
export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/cprec-${SLURM_JOB_ID:-$$}-$restarts/torch_extensions
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}     # srun does not take it from sbatch
ulimit -n "$(ulimit -Hn)"                               # a reader keeps a file open per shard

of_srun=() inside=()
case ${CONTAINER:+$CONTAINER_TOOL} in
    "") source "$VENV/bin/activate" ;;
    pyxis)
        mounts=$(printf '%s\n' "${CONTAINER_MOUNTS[@]}" | sed 's/.*/&:&/' | paste -sd,)
        of_srun=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer)
        inside=(apptainer exec --nv --pwd "$PWD" "${CONTAINER_MOUNTS[@]/#/--bind=}" "$CONTAINER") ;;
    *) echo "CONTAINER_TOOL=$CONTAINER_TOOL in the site file: it is pyxis or apptainer" >&2; exit 2 ;;
esac

ranks() {
    local per_node=${SLURM_NTASKS_PER_NODE:-1}
    srun --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --kill-on-bad-exit=1 \
        "${of_srun[@]}" "${inside[@]}" python "$@"
}

one() {
    srun --nodes=1 --ntasks=1 "${of_srun[@]}" "${inside[@]}" python "$@"
}

leave() {
    echo "$(date '+%F %T') exit code $1"
    case $1 in
        75 | 76)
            if [[ -n ${CPREC_CHAIN:-} ]]; then
                echo "the next job of the chain goes on"
            elif ((restarts < MAX_REQUEUES)); then
                scontrol requeue "$SLURM_JOB_ID"
            else
                echo "it has come back $restarts times: submit it again to go on" >&2
            fi ;;
        2 | 3 | 4 | 5 | 6 | 77)                         # a person has to look, or wanted it so: the chain ends here
            [[ -z ${CPREC_CHAIN:-} ]] || squeue --me --noheader --states=PENDING --format='%i %k' |
                awk -v chain="$CPREC_CHAIN" '$2 == chain {print $1}' | xargs --no-run-if-empty scancel ;;
    esac
    exit "$1"
}
