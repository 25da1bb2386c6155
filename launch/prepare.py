"""Prepare corpora and ranking queries from raw interaction logs; CPU only, restartable.

    python launch/prepare.py --config data_prep/configs/complete_journey.yaml [key.sub=value ...] [--dry-run]
    mpirun -n 64 python launch/prepare.py --config ...    # one rank leads, the others work, on as many machines
    python launch/prepare.py --config ... --export recbole    # the splits, for RecBole's models
"""

from __future__ import annotations

from cprec import cli
from cprec.settings import dump_settings, load_settings
from data_prep.config import PrepConfig
from data_prep.estimate import estimate
from data_prep.pipeline import Preparation, export_recbole, finished_stages, prepare
from data_prep.workers import n_mpi_ranks, over_mpi


def main() -> None:
    """Read the command line, then prepare or say what would be done."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see data_prep/configs/")
    parser.add_argument("--dry-run", action="store_true",
                        help="check config, sources, columns and clock, say what would be read, run and made, stop")
    parser.add_argument("--export", choices=["recbole"], help="write a finished preparation's splits and items for "
                        "others, into a folder of that name below `out`")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings on top of the file")
    args = parser.parse_args()
    config = load_settings(PrepConfig, args.config, args.overrides)
    if args.dry_run:
        show_plan(config)
    elif args.export:
        print(f"written: {export_recbole(config)}")
    elif n_mpi_ranks() > 1:
        over_mpi(lambda workers: prepare(config, workers))
    else:
        prepare(config)


def show_plan(config: PrepConfig) -> None:
    """Print the resolved settings, the sources, which stages would run and an estimate; writes nothing below `out`."""
    preparation = Preparation(config)
    try:
        stages = preparation.stages()
        finished = finished_stages(preparation, stages)
        print(dump_settings(config))
        for label, source in preparation.staging.sources.items():
            print(f"source {label}: {source.n_bytes:,} bytes")
        for stage in stages:
            print(f"stage {stage.name}: {'finished' if stage.name in finished else 'to do'}")
        print(f"written to {preparation.layout.out}: {', '.join(preparation.written())}")
        made = estimate(config, preparation.staging, template=preparation.template)
        print("\n".join(made.lines()))
    finally:
        preparation.close()


if __name__ == "__main__":
    cli.run(main)
