"""Multinomial logistic regression: the classifier that a model's vectors are judged by."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from scipy.optimize import minimize

from jaxembed.config import MeshConfig
from jaxembed.sharding import make_mesh, put

C = 1.0  # inverse strength of the L2 penalty: scikit-learn's and MTEB's
MAX_ITERATIONS = 10_000
# Fitting ends where no component of the gradient of the summed loss is larger. Along the weights the objective curves
# at least as the penalty does, by 1 / C; biases have no penalty, so that this is much less than weights would need.
TOLERANCE = 1e-5


def fit(features_NxE: np.ndarray, classes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a linear classifier by L-BFGS.

    Minimises C · Σ cross-entropy + |weights|² / 2, with biases that are not penalised, as scikit-learn's
    LogisticRegression does. As there, the first of two classes has no parameters: its logit is 0.

    Args:
      features_NxE: float32.
      classes_N: whole numbers 0 … classes - 1, each at least once; two classes at least.

    Returns:
      Weights [classes, E] and biases [classes], float64.
    """
    n_classes, width = int(classes_N.max()) + 1, features_NxE.shape[1]
    n_free = 1 if n_classes == 2 else n_classes
    mesh = make_mesh(MeshConfig(1), [_host()])
    with jax.enable_x64(True), jax.set_mesh(mesh):  # the line search needs float64
        features, classes = put(features_NxE.astype(np.float64), mesh, P()), put(classes_N, mesh, P())

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = _objective(put(flat.reshape(n_free, width + 1), mesh, P()), features, classes)
            return float(value), np.asarray(gradient).reshape(-1)

        options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0}
        start = np.zeros(n_free * (width + 1))
        found = minimize(value_and_gradient, start, method="L-BFGS-B", jac=True, options=options)
    parameters = np.pad(found.x.reshape(n_free, width + 1), ((n_classes - n_free, 0), (0, 0)))
    return parameters[:, :-1], parameters[:, -1]


@jax.jit
@jax.value_and_grad
def _objective(free: jax.Array, features_NxE: jax.Array, classes_N: jax.Array) -> jax.Array:
    """The loss of `free`, weights and bias of each class that has some: [classes, or 1 of 2, E + 1]."""
    weights, biases = free[:, :-1], free[:, -1]
    logits = features_NxE @ weights.T + biases
    if len(free) == 1:
        logits = jnp.pad(logits, ((0, 0), (1, 0)))
    chosen = jnp.take_along_axis(logits, classes_N[:, None], axis=1)[:, 0]
    return C * (jax.nn.logsumexp(logits, axis=1) - chosen).sum() + (weights**2).sum() / 2


def _host() -> jax.Device:
    """The CPU, whatever computes the vectors: accelerators have no float64 or a slow one. Their own where it is off."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
