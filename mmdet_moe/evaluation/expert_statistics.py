"""How the experts of one MoE layer are used, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mmdet_moe.moe.routing import effective_experts

#: An expert with a smaller share of the weight is dead (arXiv 2204.10598's analysis).
LIVING = 0.01


def expert_statistics(
    weights: ArrayLike,
    domains: Sequence[Any] | ArrayLike | None = None,
    classes: Sequence[Any] | ArrayLike | None = None,
    living: float = LIVING,
) -> dict[str, Any]:
    r"""How evenly the experts are used, and what they specialise in.

    With the combine weights :math:`w_{te}`, the share of expert e is its mean weight

    .. math:: P_e = \frac{\sum_t w_{te}}{\sum_{t,j} w_{tj}}

    and the experts and a label of the items (their domain, their class) have the joint
    distribution :math:`P_{el} = \sum_{t \in l} w_{te} / \sum_{t,j} w_{tj}`, of which

    .. math:: I = \sum_{e,l} P_{el} \ln \frac{P_{el}}{P_e P_l}, \qquad
        \mathrm{NMI} = \frac{2 I}{H(P_e) + H(P_l)}

    is the mutual information in nats, and without a unit: 0 when the experts do not know the
    label, 1 when each has a label of its own. With few items I is too large, by about
    (E - 1)(L - 1) / 2T for L labels.

    Args:
        weights: (T, E) combine weights, >= 0; 0 for experts an item does not go to. An item may
            have none.
        domains: The T items' domains, names or numbers.
        classes: The T items' classes.
        living: What the share of a living expert is above.

    Returns:
        ``items``: T. ``share``: P, E numbers. ``cv``: the coefficient of variation of P, with the
        deviation over E: 0 at even use, :math:`\sqrt{E - 1}` at collapse. ``living``: the number
        of living experts. ``effective_k``: the mean over all items of
        :math:`\exp H(w_t / \sum_e w_{te})`: k where an item's k experts weigh the same, 1 where
        one has all, 0 for an item that was dropped. For each of 'domain' and 'class' that is given
        ``mi_<label>`` and ``nmi_<label>``.

    Raises:
        ValueError: Weights that are negative, not finite, not of shape (T, E), or all zero; labels
            of another number than the items.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or not w.size:
        raise ValueError(f'weights must have shape (items, experts), got {w.shape}')
    if not np.isfinite(w).all() or w.min() < 0 or not w.any():
        raise ValueError('weights must be finite, >= 0 and not all zero')
    found: dict[str, Any] = {
        'items': len(w),
        'share': shares(w.sum(0)).tolist(),
        'cv': coefficient_of_variation(w.sum(0)),
        'living': living_experts(w.sum(0), living),
        'effective_k': float(effective_experts(torch.from_numpy(w)).mean()),
    }
    for name, labels in (('domain', domains), ('class', classes)):
        if labels is not None:
            joint = _joint(w, labels, name)
            found[f'mi_{name}'], found[f'nmi_{name}'] = mutual_information(joint)
    return found


def shares(importance: ArrayLike) -> NDArray:
    """(E,) P, the experts' weight sums over the sum of all; 0 where there is none."""
    importance = np.asarray(importance, dtype=np.float64)
    return importance / max(float(importance.sum()), 1e-300)


def living_experts(importance: ArrayLike, living: float = LIVING) -> int:
    """Number of experts whose share P of the weight is above ``living``. Dropped items have no
    weight, and so change nothing."""
    return int((shares(importance) > living).sum())


def coefficient_of_variation(values: ArrayLike) -> float:
    """Standard deviation (over all, not n - 1) by mean; 0 where the mean is 0."""
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean()
    return float(values.std() / mean) if mean else 0.0


def _joint(weights: NDArray, labels: Any, name: str) -> NDArray:
    """(E, L) the share of each pair of expert and label, sum 1."""
    labels = np.asarray(labels)
    if labels.shape != weights.shape[:1]:
        raise ValueError(
            f'{labels.size} {name} labels of shape {labels.shape} for {len(weights)} items'
        )
    names, index = np.unique(labels, return_inverse=True)
    joint = weights.T @ np.eye(len(names))[index]
    return joint / joint.sum()


def mutual_information(table: NDArray) -> tuple[float, float]:
    """(I in nats, NMI) of the two sides of a table of weights; (0, 0) where it has none."""
    if not table.any():
        return 0.0, 0.0
    joint = table / table.sum()
    sides = float(_entropy(joint.sum(0)) + _entropy(joint.sum(1)))
    # Rounding must not make it negative.
    mi = max(0.0, sides - float(_entropy(joint.ravel())))
    return mi, 2 * mi / sides if sides > 0 else 0.0


def _entropy(p: NDArray) -> NDArray:
    """H over the last dimension, in nats, with 0 ln 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
