"""Several processes as one: starts `jax.distributed` where there is more than one.

Under Slurm and Open MPI JAX finds its peers by itself; elsewhere the coordinator's address, the number of processes and
each one's id are given, or stand in RETEX_COORDINATOR, RETEX_NUM_PROCESSES and RETEX_PROCESS_ID (a Kubernetes JobSet
sets them; see experiments/cluster).

A scheduler may call one process away and not the others: `any_process` lets all of them leave at the same step.
"""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

_GIVEN = ("RETEX_COORDINATOR", "RETEX_NUM_PROCESSES", "RETEX_PROCESS_ID")
# By launcher, the variable that holds the number of processes.
_LAUNCHERS = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Joins the other processes, once, before any device is used.

    Args:
      coordinator: "HOST:PORT" of process 0, the same in all; found by itself where it is None.
      num_processes: how many there are; with a coordinator only.
      process_id: of this one, from 0; with a coordinator only.
      environment: in place of os.environ.

    Returns:
      The number of processes.

    Raises:
      ValueError: if only some of the three are given, or they are no possible numbers; all problems are listed.
      RuntimeError: if the others do not answer.
    """
    environment = os.environ if environment is None else environment
    given = [coordinator, num_processes, process_id]
    if all(value is None for value in given):
        given = [environment.get(name) or None for name in _GIVEN]
    if any(value is not None for value in given):
        address, count, own = _checked(*given)
        if count > 1:
            jax.distributed.initialize(address, count, own)
        return count
    if any(int(environment.get(name) or 1) > 1 for name in _LAUNCHERS.values()):
        jax.distributed.initialize()
        return jax.process_count()
    return 1


def any_process(flag: bool) -> bool:
    """Whether it is so in any process; all of them ask at the same step, and get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _checked(address: object, count: object, own: object) -> tuple[str, int, int]:
    problems = [
        f"{name}: got None, expected all of coordinator, num_processes and process_id"
        for name, value in zip(
            ("coordinator", "num_processes", "process_id"), (address, count, own), strict=True
        )
        if value is None
    ]
    if problems:
        raise ValueError("\n".join(problems))
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit():
        problems.append(f"coordinator: got {address!r}, expected HOST:PORT")
    numbers = {"num_processes": count, "process_id": own}
    for name, value in numbers.items():
        if not str(value).isdigit():
            problems.append(f"{name}: got {value!r}, expected a number")
    if not problems and not int(str(own)) < int(str(count)):
        problems.append(f"process_id: got {own}, expected 0 to {int(str(count)) - 1}")
    if problems:
        raise ValueError("\n".join(problems))
    return str(address), int(str(count)), int(str(own))
