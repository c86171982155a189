"""ReTeX's memory, of the form that the paper trains and of the one with the generators baked in.

The paper's accuracies stand beside a "normalized memory" (arXiv:2606.26902, Figs. 5, 6, 11 and 14) that it does
not define. Here it is (bytes of the merged model + bytes of all offsets) / bytes of one model, of numbers as
they are stored; T experts are T.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

from retex_jax import tree
from retex_jax.offsets.forms import Extended, Form, Separate

# What a form has once for each entry of an embedding; the rest all tasks share.
_GENERATED = ("generator", "left", "right", "scales")


class Memory(NamedTuple):
    """Bytes, or models, of one fit in two forms.

    Attributes:
      generator: embeddings and linear layers with their biases: K = d_emb + 1 entries, [T, d_emb] embeddings.
      baked: the tasks' own factors: K = T entries, no embeddings.
    """

    generator: float
    baked: float


def form_bytes(offsets: Mapping[str, Form], num_tasks: int, d_emb: int) -> Memory:
    """Bytes that offsets of these forms take beside the merged model, for all tasks.

    Args:
      offsets: of a state, by leaf name, with any number K of entries.
      num_tasks: T.
      d_emb: size of the embeddings that generate them.

    Returns:
      Bytes. What leaves share counts once, and an affine form's theta_0 counts in both forms.

    Raises:
      ValueError: if a leaf holds products that are each one task's, or a task that was added: no generator
        makes these.
    """
    generated = shared = 0.0
    for name, form in offsets.items():
        if isinstance(form, Separate | Extended):
            kind = type(form).__name__
            raise ValueError(f"{name}: got {kind}, products of single tasks, expected a generator")
        for part in fields(form):
            if part.metadata.get("static"):
                continue
            value = getattr(form, part.name)
            size = tree.param_bytes(value)
            if part.name in _GENERATED:
                # A coded array has its entries' own shape beside it.
                generated += size / value.shape[0]
            else:
                shared += size
    embeddings = 4 * num_tasks * d_emb
    return Memory(
        embeddings + (d_emb + 1) * generated + shared,
        num_tasks * generated + shared,
    )


def normalized_memory(
    offsets: Mapping[str, Form], model_bytes: int, num_tasks: int, d_emb: int
) -> Memory:
    """The merged model and the offsets, in models.

    Args:
      offsets: see `form_bytes`.
      model_bytes: of the merged model, `tree.param_bytes(state.merged)`.
      num_tasks: T.
      d_emb: size of the embeddings.

    Returns:
      1 + `form_bytes` / `model_bytes`.
    """
    return Memory(*(1 + size / model_bytes for size in form_bytes(offsets, num_tasks, d_emb)))
