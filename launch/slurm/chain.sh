#!/usr/bin/env bash
# A chain of N jobs, each of which goes on where the one before it was cut off: for runs longer than the time limit on
# clusters that do not let jobs requeue themselves. When the run is done, the jobs that are left vanish.
#
#     launch/slurm/chain.sh N [options of sbatch] pretrain.sbatch CONFIG [key=value ...]
set -euo pipefail
n=${1:?launch/slurm/chain.sh N [options of sbatch] TEMPLATE [arguments]}
[[ $n =~ ^[1-9][0-9]*$ ]] || { echo "N=$n is no number of jobs" >&2; exit 2; }
export CPREC_CHAIN="cprec-chain-$(date +%s)-$$"     # by it a job that fails for good finds the rest of its chain
after=()
for _ in $(seq "$n"); do
    job=$("$(dirname "${BASH_SOURCE[0]}")/submit.sh" --parsable --no-requeue --comment="$CPREC_CHAIN" "${after[@]}" "${@:2}")
    echo "${job%%;*}"
    after=(--dependency="afternotok:${job%%;*}" --kill-on-invalid-dep=yes)
done
