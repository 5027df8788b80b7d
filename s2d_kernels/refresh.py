"""What a refresh computes beside training: factors and decisions of the captured weights, from plain arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from s2d_kernels import ops
from s2d_kernels.capture import Captured
from s2d_kernels.layers import Refreshed
from s2d_kernels.penalty import penalty_status
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import CONVERGED, NON_FINITE, OVERFLOW, SVDBasis, topk_svd, warm_width

logger = logging.getLogger("s2d_kernels")


def compute_refresh(
    captured: Mapping[str, Captured],
    bases: Mapping[str, SVDBasis | None],
    *,
    mode: str,
    strength: float,
    power: float,
    threshold: float,
    k_max: int,
    seed: int,
    max_sms: int | None,
    impl: str | None,
) -> dict[str, Refreshed]:
    """Factors and decisions of every captured matrix; runs on the side stream and touches no live parameter.

    Args:
        captured: by name the weight `[m, n]`, and the input row and neuron of its largest activation.
        bases: by name the basis to start from, None for a cold start.
        mode, strength, power, threshold, k_max, max_sms, impl: as in `S2D`.
        seed: of the random columns, another for each refresh.

    Returns:
        By name, without those that were not called, bases of `min(warm_width(k), m, n)` components and ranks; rank 0
        where a matrix is not finite, or where the coupled form's strength * s^power overflows.
    """
    values = torch.stack([entry.value for entry in captured.values()]).tolist()
    names = [n for n, value in zip(captured, values, strict=True) if captured[n].certain or value >= 0]
    if not names:
        logger.warning("S2D: nothing was captured for a refresh, so that the previous factors stay in use")
        return {}
    weights = [captured[name].weight for name in names]
    ks = [min(k_max, *weight.shape) for weight in weights]
    warm = [bases[name] for name in names]
    factors = topk_svd(weights, k=ks, warm=warm, seed=seed, keys=names, max_sms=max_sms, impl=impl)
    decisions = pcdr(
        weights,
        [captured[name].x for name in names],
        [captured[name].neuron for name in names],
        factors,
        threshold=threshold,
        k_max=k_max,
        impl=impl if impl in ops.available("pcdr_exact") else None,
    )
    statuses = torch.stack([factor.status for factor in factors])
    if mode == "coupled":
        statuses = penalty_status(factors, strength=strength, power=power)
    sigmas = torch.stack([factor.S[0] for factor in factors])
    on_host = torch.stack([statuses.double(), sigmas.double()]).tolist()  # once for all layers
    refreshed = {}
    for name, weight, k, factor, decision, status, sigma in zip(
        names, weights, ks, factors, decisions, *on_host, strict=True
    ):
        width = min(warm_width(k), *weight.shape)
        U, S, Vh, residual = factor.basis
        basis = SVDBasis(U[:, :width].contiguous(), S[:width], Vh[:width], residual[:width])
        rank = 0 if status in (NON_FINITE, OVERFLOW) else min(decision.k_target, k)
        refreshed[name] = Refreshed(basis, rank, int(status), sigma, decision)
    return refreshed


def log_arrival(step: int, refreshed: Mapping[str, Refreshed]) -> None:
    """Log what the refresh of `step` decided; warn of matrices that are not finite."""
    for name, fresh in refreshed.items():
        if fresh.status in (NON_FINITE, OVERFLOW) or (fresh.pcdr is not None and fresh.pcdr.route == "non-finite"):
            logger.warning(
                "S2D refresh of step %d: %s holds NaN or Inf (or overflows): no penalty until the next refresh",
                step,
                name,
            )
        elif fresh.status != CONVERGED:
            logger.info("S2D refresh of step %d: %s did not converge, cold start next", step, name)
    chosen = [f"{name} ({fresh.rank})" for name, fresh in refreshed.items() if fresh.rank]
    logger.info(
        "S2D refresh of step %d: %d of %d matrices decayed: %s",
        step,
        len(chosen),
        len(refreshed),
        ", ".join(chosen) or "none",
    )
