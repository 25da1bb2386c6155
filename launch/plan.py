"""What a run will take, from its config: memory by part, micro batch, communication, time, checkpoints, ds_config.

    python launch/plan.py --config launch/configs/qwen2.5-1.5b.yaml --nodes 8 --gpus-per-node 8 --device h100 \\
        [--mfu 0.4 | --measured runs/short] [--network-gb-s 40] [--storage-gb-s 5] [key=value ...] [--json]

Needs no GPU, no weights, and no data if --seq-len is given: of the model its config.json. --measured takes the MFU that
a run on the same kind of device has logged. Bandwidths are bus bandwidths of an all-reduce, as launch/preflight.py
measures them. docs/plan.md says how far the numbers are from measured ones.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from cprec.cluster.cost import Rows
    from cprec.config import RunConfig


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", required=True, help="run config, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    machines = parser.add_argument_group("the cluster")
    machines.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    machines.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    machines.add_argument("--device", default="h100", help="h100, h200, a100, ... (default: %(default)s)")
    machines.add_argument("--mfu", type=float, default=0.4, help="share of the device's peak (default: %(default)s)")
    machines.add_argument("--measured", metavar="RUN", type=Path, help="take the median MFU of this run instead")
    machines.add_argument("--network-gb-s", type=float, default=40.0, help="bus bandwidth over several nodes "
                          "(default: %(default)s, one 400 Gb/s port)")
    machines.add_argument("--storage-gb-s", type=float, default=5.0, help="to checkpoints (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, help="tokens per row, where the data are not here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from cprec.cluster.cost import Cluster, device_called, estimate, text
    from cprec.config import RunConfig
    from cprec.settings import load_settings

    config = load_settings(RunConfig, args.config, args.overrides)
    cluster = Cluster(args.nodes, args.gpus_per_node, device_called(args.device), args.network_gb_s, args.storage_gb_s,
                      measured_mfu(args.measured) if args.measured else args.mfu)
    ds_configs = Path(__file__).parents[1] / "ds_configs"
    cost = estimate(config, find_rows(config, args.seq_len), cluster, ds_configs=ds_configs)
    print(json.dumps({**asdict(cost), "device_hours": cost.device_hours}) if args.json else text(cost, cluster))


def find_rows(config: RunConfig, seq_len: int | None) -> Rows:
    """What the packed data say; without them, rows of `seq_len` tokens that are one document each."""
    from cprec.cluster.cost import Rows, rows_of
    from cprec.data.corpora import cache_for, open_manifests

    if seq_len is not None:
        return Rows(seq_len, float(seq_len), vocab_size=None, n_shards=None)
    data = config.data
    try:
        train = open_manifests(data.packed, "train", cache_for(data.packed, folder=data.cache_dir, gb=data.cache_gb))
    except DataError as e:
        raise ConfigError(f"{e}; or give --seq-len to plan without the data") from None
    return rows_of(list(train.values()))


def measured_mfu(run: Path) -> float:
    """Median over the run's records. Raises CheckpointError when there is none."""
    from cprec.train.metrics import read_metrics

    found: list[float] = [r["mfu"] for r in read_metrics(run) if r.get("mfu")]
    if not found:
        raise CheckpointError(f"--measured {run}: its metrics.jsonl has no MFU (on a CPU there is none); give --mfu")
    return statistics.median(found)


if __name__ == "__main__":
    cli.run(main)
