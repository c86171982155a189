"""The linear probe: the floor that a fine-tuned expert must beat.

Multinomial logistic regression on standardised frozen features, by L-BFGS in float32; the L2 penalty is
chosen on validation data from a grid, all of whose fits run under one vmap. Labels of a float dtype are numbers to
predict, and the squared error takes the place of the cross-entropy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


class Probe(NamedTuple):
    """A linear classifier on features: logits = features @ kernel + bias.

    Attributes:
      kernel: [d, num_classes], float32.
      bias: [num_classes], float32.
    """

    kernel: jax.Array
    bias: jax.Array


def fit_all(
    train_features: jax.Array, train_labels: jax.Array, num_classes: int, *, steps: int = 150
) -> list[Probe]:
    """Fits one probe for each of `PENALTIES`, in their order.

    Args:
      train_features: [n, d], float32.
      train_labels: [n], integers below `num_classes`, or numbers of a float dtype.
      num_classes: number of classes; 1 for labels of a float dtype.
      steps: of L-BFGS.

    Returns:
      The probes, for features that are not standardised.
    """
    mean = train_features.mean(axis=0)
    scale = 1 / (train_features.std(axis=0) + 1e-6)
    standardized = (train_features - mean) * scale
    fits = jax.vmap(partial(_fit_one, standardized, train_labels, num_classes, steps))
    kernels, biases = fits(jnp.asarray(PENALTIES))
    kernels = kernels * scale[:, None]
    biases = biases - jnp.einsum("d,pdc->pc", mean, kernels)
    return [Probe(kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]


def fit(
    train_features: jax.Array,
    train_labels: jax.Array,
    val_features: jax.Array,
    val_labels: jax.Array,
    num_classes: int,
    *,
    steps: int = 150,
) -> Probe:
    """Fits one probe a penalty and returns the one that is best on the validation data.

    Args:
      train_features: [n, d], float32.
      train_labels: [n], integers below `num_classes`, or numbers of a float dtype.
      val_features: [m, d], float32.
      val_labels: [m].
      num_classes: number of classes; 1 for labels of a float dtype.
      steps: of L-BFGS.

    Returns:
      The probe, for features that are not standardised.
    """
    probes = fit_all(train_features, train_labels, num_classes, steps=steps)
    return select(probes, val_features, val_labels)


def select(probes: list[Probe], val_features: jax.Array, val_labels: jax.Array) -> Probe:
    """The probe that is most often right on the validation data, or has the least error; of equals, the first."""
    outputs = [val_features @ probe.kernel + probe.bias for probe in probes]
    merits: list[float]
    if jnp.issubdtype(jnp.asarray(val_labels).dtype, jnp.floating):
        merits = [-float(mean_loss(output, val_labels)) for output in outputs]
    else:
        merits = [int((output.argmax(axis=1) == val_labels).sum()) for output in outputs]
    return probes[merits.index(max(merits))]


def mean_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [B, C]; of one output and labels of a float dtype, the mean squared error."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.mean((outputs[:, 0] - labels) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


@partial(jax.jit, static_argnums=(2, 3))
def _fit_one(
    features: jax.Array, labels: jax.Array, num_classes: int, steps: int, penalty: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, bias = params
        logits = features @ kernel + bias
        return mean_loss(logits, labels) + penalty * jnp.sum(kernel**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    params = (jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params
