"""Leaves of any pytree: names, descriptions, content hashes, and how they are stored."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


class Description(NamedTuple):
    """What the record says about one leaf, besides its hash."""

    shape: tuple[int, ...]
    dtype: str
    impl: str | None = None  # the generator of a typed PRNG key

    def __str__(self) -> str:
        """Returns "float32[3, 4]"."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def name_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """Names the leaves of a pytree by their paths, joined with "/".

    Returns:
      (Leaf name to leaf in flattening order, tree definition).

    Raises:
      ValueError: if there are no leaves, a leaf isn't numeric, boolean or a PRNG key, or two leaves
        would share a name on disk, where "/" becomes ".".
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not paths:
        raise ValueError("tree: got no leaves, expected at least one array")
    named: dict[str, Any] = {}
    owner: dict[str, str] = {}
    problems = []
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        other = owner.setdefault(name.replace("/", "."), name)
        if name in named or other != name:
            problems.append(f"leaves {other!r} and {name!r} have one name on disk")
        elif not is_key(leaf) and not _is_numeric(leaf):
            problems.append(f"leaf {name!r} is a {type(leaf).__name__} of dtype {_dtype(leaf)}")
        named[name] = leaf
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"tree: expected arrays of numbers with distinct names:\n  {listed}")
    return named, treedef


def describe(leaf: Any) -> Description:
    """Returns shape, dtype and generator of an array, ShapeDtypeStruct or number."""
    if is_key(leaf):
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return Description(tuple(leaf.shape), str(leaf.dtype), impl)
    return Description(tuple(np.shape(leaf)), np.dtype(_dtype(leaf)).name)


def is_key(leaf: Any) -> bool:
    """Tells typed PRNG keys (jax.random.key) from everything else."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_on_device(leaf: Any) -> bool:
    """Tells what is restored as a jax.Array from what is restored as NumPy."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def as_stored(leaf: Any) -> Any:
    """Turns keys into their data, and NumPy and numbers into native byte order."""
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if is_key(leaf) else leaf
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def target(like: Any, impl: str | None) -> Any:
    """Returns what to read for one leaf: a ShapeDtypeStruct with a sharding, or a NumPy array."""
    if not is_on_device(like):
        return as_stored(like)
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape, dtype = like.shape, like.dtype
    if is_key(like):
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
        shape, dtype = (*shape, *data.shape), data.dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def as_given(found: Any, like: Any, impl: str | None) -> Any:
    """Turns what was read into the kind of leaf that `like` has."""
    if is_key(like):
        return jax.random.wrap_key_data(found, impl=impl)
    if is_on_device(like) or isinstance(like, np.ndarray):
        return found
    return type(like)(found.item()) if isinstance(like, bool | int | float) else found[()]


def content_hash(leaf: Any) -> str:
    """Returns the SHA-256 of a leaf's whole content in C order, whatever its sharding."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    flat = np.ascontiguousarray(leaf).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _is_numeric(leaf: Any) -> bool:
    dtype = np.dtype(_dtype(leaf))
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)
