"""Eight simulated devices, no network, and reproducible Hypothesis runs."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Compiling takes most of the time; XLA's older emitters, which later versions lack, compile in a third of it.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

hypothesis.settings.register_profile(
    "tests",
    database=None,
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def _is_local(family: int, address: object) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0]) if isinstance(address, tuple) else str(address)
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked `packages` must not leave this machine."""
    if request.node.get_closest_marker("packages"):
        return

    def guard(name: str) -> None:
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: object) -> object:
            if not _is_local(self.family, address):
                raise RuntimeError(f"a test without the mark 'packages' connects to {address!r}")
            return real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)

    guard("connect")
    guard("connect_ex")
    real_lookup = socket.getaddrinfo

    def lookup(host: object, *args: object, **kwargs: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _is_local(socket.AF_INET, (name,)):
            raise RuntimeError(f"a test without the mark 'packages' looks up {name!r}")
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.fixture(autouse=True, scope="module")
def drop_compiled() -> Iterator[None]:
    """Compiled functions of a file are dropped after it: a process can hold some 10,000, and then crashes."""
    yield
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """Tracing makes many objects: what was imported need not be searched for garbage each time."""
    gc.freeze()
    gc.set_threshold(5000, 20, 20)


@pytest.fixture
def place_on_8_devices() -> Callable[[dict[str, Any]], dict[str, jax.Array]]:
    """Spreads every leaf over all devices, by its last axis that eight divides."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: Any) -> jax.Array:
        axes: list[str | None] = [None] * np.ndim(leaf)
        for axis in reversed(range(np.ndim(leaf))):
            if np.shape(leaf)[axis] % 8 == 0:
                axes[axis] = "x"
                break
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    return lambda leaves: {name: place(leaf) for name, leaf in leaves.items()}
