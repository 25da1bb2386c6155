#!/usr/bin/env bash
# Hand a template to SLURM with what launch/slurm/site.sh asks for.
#
#     launch/slurm/submit.sh [options of sbatch] TEMPLATE [its arguments]
#     launch/slurm/submit.sh --nodes=4 pretrain.sbatch launch/configs/qwen2.5-1.5b.yaml optimizer.peak_lr=3e-5
#
# Submit from the repository. Options given here go before those of site.sh, and those before the template's.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "${CPREC_SITE:-$here/site.sh}"
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
template=${1:?launch/slurm/submit.sh [options of sbatch] TEMPLATE [arguments]}
case $(basename "$template") in
    prepare.sbatch) asked=("${PREPARING[@]}") ;;
    pretrain.sbatch) asked=("${TRAINING[@]}" "--signal=USR1@$WARN_S") ;;
    sweep.sbatch) asked=("${ANNEALING[@]}" "--signal=USR1@$WARN_S") ;;
    rank.sbatch) asked=("${RANKING[@]}") ;;
    export.sbatch) asked=("${EXPORTING[@]}") ;;
    *) echo "no template $template; there are: $(cd "$here" && echo ./*.sbatch)" >&2; exit 2 ;;
esac
exec sbatch "${EVERY_JOB[@]}" "${asked[@]}" "${options[@]}" "$here/$(basename "$template")" "${@:2}"
