"""What every implementation of topk_svd owes, in LAPACK's measure: ratios to ||A|| max(m, n) eps below 30."""

from __future__ import annotations

import pytest
import torch
from emulated import build_emulated
from helpers import decaying_spectrum, lapack_ratios, matrix_with_spectrum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d_kernels import topk_svd
from s2d_kernels.svd import CONVERGED, NON_FINITE

EPS = torch.finfo(torch.float32).eps
LIMIT = 30.0
# Those that hold however few the reads: a Ritz value never exceeds the singular value, and what is stated is true.
STRUCTURAL_RATIOS = (
    "above the truth",
    "orthogonality of U",
    "orthogonality of V",
    "residual of the other side",
    "stated residual",
)


def check_spike(impl: str, device: torch.device) -> None:
    """Orthogonal to all that is known, 1.5 s_1 high: found within one warm refresh, in 100 of 100 seeds."""
    weights = [matrix_with_spectrum(48, 40, decaying_spectrum(40, rate=0.03), seed=seed) for seed in range(100)]
    names = [str(seed) for seed in range(100)]
    before = topk_svd(weights, k=3, keys=names, impl="torch")  # exact: 8 reads of 16 directions span the space
    spiked = []
    for weight, known in zip(weights, before, strict=True):
        u, v = torch.randn(48), torch.randn(40)
        u, v = u - known.basis.U @ (known.basis.U.mT @ u), v - known.basis.Vh.mT @ (known.basis.Vh @ v)
        spiked.append(weight + 1.5 * known.S[0] * torch.outer(u / u.norm(), v / v.norm()))
    got = topk_svd([weight.to(device) for weight in spiked], k=3, warm=before, seed=1, keys=names, impl=impl)
    truth = torch.linalg.svdvals(torch.stack(spiked).double())[:, 0]
    found = torch.stack([result.S[0] for result in got]).double().cpu()
    assert ((found / truth - 1).abs() < 1e-3).all()


matrices = st.lists(
    st.tuples(
        st.integers(1, 150),
        st.integers(1, 150),
        st.integers(1, 4),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.sampled_from([1.0, 1e-4, 100.0]),
        st.sampled_from(["decaying", "equal", "gaussian", "rank one", "zero", "broken"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def example(m: int, n: int, kind: str, seed: int) -> torch.Tensor:
    d = min(m, n)
    if kind == "gaussian":
        return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    spectra = {
        "decaying": decaying_spectrum(d, rate=0.1),
        "equal": torch.ones(d),
        "rank one": torch.eye(d)[0],
        "zero": torch.zeros(d),
        "broken": torch.ones(d),
    }
    matrix = matrix_with_spectrum(m, n, spectra[kind], seed=seed)
    if kind == "broken":
        matrix[seed % m, seed % n] = float("nan")
    return matrix


def check_properties(impl: str, device: torch.device, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(given_matrices=matrices, seed=st.integers(0, 100), reads=st.sampled_from([None, 1, 2, 5]))
    def run(given_matrices: list[tuple], seed: int, reads: int | None) -> None:
        weights, kinds, ks = [], [], []
        for m, n, k, dtype, scale, kind, transposed in given_matrices:
            weight = (example(m, n, kind, seed) * scale).to(dtype).to(device)
            weights.append(weight.T.contiguous().T if transposed else weight)
            kinds.append(kind)
            ks.append(min(k, m, n))
        cold = topk_svd(weights, k=ks, seed=seed, reads=reads, impl=impl)
        warm = topk_svd(weights, k=ks, warm=cold, seed=seed + 1, impl=impl)
        for weight, kind, k, *results in zip(weights, kinds, ks, cold, warm, strict=True):
            if kind == "broken":
                assert all(r.status == NON_FINITE and not any(t.any() for t in r.basis) for r in results)
                continue
            truth = torch.linalg.svdvals(weight.double().cpu())
            unit = float(truth[0]) * max(weight.shape) * EPS or 1.0
            for result in results:
                S = result.S.double().cpu()
                assert (S[:-1] >= S[1:]).all()
                ratios = lapack_ratios(weight, *result[:4])
                for name in STRUCTURAL_RATIOS:
                    assert ratios[name] < LIMIT, (name, ratios)
                if kind == "zero" or (kind == "rank one" and reads != 1):
                    assert result.status == CONVERGED
                if (kind == "rank one" and reads != 1) or (kind == "decaying" and result.status == CONVERGED):
                    assert ((S - truth[:k]).abs() / unit).max() < LIMIT + 2e-4 / (max(weight.shape) * EPS)
                assert float(result.missed) >= float(truth[k] if k < len(truth) else 0) * (1 - 1e-3) - unit * LIMIT

    run()


CHECKS = {"spike": check_spike, "properties": check_properties}
EXAMPLES = {"cpu": 40, "torch": 20, "cuda": 6, "triton": 6}


@pytest.mark.parametrize("impl", list(EXAMPLES))
@pytest.mark.parametrize("name", list(CHECKS))
def test_contract(name: str, impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if impl == "cuda" and device.type == "cpu":
        build_emulated()
        monkeypatch.setenv("S2D_NATIVE", "emulated")
    if impl == "triton" and device.type == "cpu":
        pytest.skip("too slow in Triton's interpreter: test_triton_svd.py has both for narrow blocks")
    where = torch.device("cpu") if impl == "cpu" else device
    CHECKS[name](impl, where, *([EXAMPLES[impl]] if name == "properties" else []))


def test_a_warm_start_of_another_shape_is_refused_on_either_side() -> None:
    for m, n in ((40, 60), (60, 40), (5, 5)):
        (before,) = topk_svd([torch.randn(m, n)], k=2)
        for start in (before, before.basis):
            topk_svd([torch.randn(m, n)], k=2, warm=[start])
            for shape in ((m + 1, n), (m, n + 1), (m - 1, n), (m, n - 1), (50 * m, n), (m, 50 * n)):
                with pytest.raises(ValueError, match=r"warm\[0\] has U .* do not fit weights\[0\] of shape"):
                    topk_svd([torch.randn(*shape)], k=2, warm=[start])
