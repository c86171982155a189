"""Which code ran, and on what."""

import subprocess
from pathlib import Path

import jax


def commit() -> str:
    """The commit of the checkout that this package lies in, "+" if it is changed; or "unknown"."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def device() -> str:
    """What the run computes on, such as "8 x NVIDIA H100"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
