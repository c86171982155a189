"""ReTeX's offsets of many experts on many devices, in closed form: one process a host, or several on one.

    srun python experiments/cluster/fit_offsets.py --pretrained=PATH --experts PATH PATH ... --out=offsets.safetensors

Every process reads the headers of all experts, and the data of those that its devices hold. The number of experts must
be a multiple of the devices along "task"; --layer gives the leaves of one shape to so many devices side by side.
Process 0 writes one safetensors file, which `retex_jax.offsets.factor_file.load` maps. slurm.sh and jobset.yaml start
it.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from retex_jax import ExpertSet, distributed, logging, offsets
from retex_jax.offsets import factor_file


def main() -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", type=Path, required=True, help="file or snapshot folder")
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--exclude", nargs="*", default=[], help="leaves that are heads")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--orientation", choices=("right", "left", "auto"), default="right")
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64")
    parser.add_argument("--layer", type=int, default=1, help="devices along the layers")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    distributed.start()
    devices = np.array(jax.devices())
    if len(devices) % args.layer:
        parser.error(f"--layer={args.layer}: there are {len(devices)} devices")
    mesh = jax.sharding.Mesh(devices.reshape(-1, args.layer), ("task", "layer"))
    experts = ExpertSet.from_safetensors(
        args.pretrained, args.experts, exclude=args.exclude, check_finite=False
    )
    started = time.perf_counter()
    with logging.progress(len(experts.float_leaves), "fit offsets") as bar:
        state = offsets.fit_sharded(
            experts,
            mesh,
            rank=args.rank,
            orientation=args.orientation,
            precision=args.precision,
            progress=lambda done, _: bar.update(done),
        )
    report = state.report
    logging.info(
        f"residual {report.residual}, optimum {report.optimum}, ratio {report.ratio}, "
        f"{time.perf_counter() - started:.1f} s on {len(devices)} devices of {jax.process_count()} processes"
    )
    whole = offsets.gather(state)
    if jax.process_index() == 0:
        factor_file.save(args.out, whole)
        logging.info(f"wrote {args.out}")


if __name__ == "__main__":
    main()
