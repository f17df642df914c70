"""LayerNorm of a sum against float64, with the error of torch's own as the measure."""

import numpy as np
import pytest
from maskgit.kernels.common.backends import is_interpreting

torch = pytest.importorskip("torch")

from maskgit.kernels.residual_norm import residual_norm  # noqa: E402

DTYPES = ["float32", "bfloat16", "float16"]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of one rounding
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def problem(shape, dtype, device, offset=0.0, seed=0):
    made = torch.Generator().manual_seed(seed)
    x, r = torch.randn(2, *shape, generator=made) + offset
    w, b = torch.randn(2, shape[-1], generator=made)
    return [t.to(device, getattr(torch, dtype)) for t in (x, r, w, b)]


def truth(x, r, w, b, eps):
    x, r, w, b = (t.double().cpu().numpy() for t in (x, r, w, b))
    s = x + r
    centred = s - s.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b


def check(got, arrays, dtype, eps=1e-12):
    want = truth(*arrays, eps)
    assert got.dtype == getattr(torch, dtype)
    assert got.is_contiguous()
    error = np.abs(got.double().cpu().numpy() - want)
    assert (error <= EPS[dtype] * np.abs(want) + 2.0**-19 * (1 + np.abs(want))).all()


def kernel(*arrays):
    """The Triton kernel, on the CPU in its interpreter."""
    from maskgit.kernels.residual_norm import triton_cuda

    return triton_cuda.residual_norm(*arrays)


needs_kernel = pytest.mark.skipif(
    not (is_interpreting() or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)


@needs_kernel
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 768), (2, 5, 48), (1, 1), (7, 257), (2, 1025), (1, 16384), (0, 8), (2, 0, 8)]
)
def test_kernel(shape, dtype, device):
    if device == "cpu" and not is_interpreting():
        pytest.skip("compiled for the GPU")
    arrays = problem(shape, dtype, device)
    check(kernel(*arrays, 1e-12), arrays, dtype)


@needs_kernel
def test_far_from_zero_and_rows_apart():
    """The sum is not rounded before its mean is taken; rows of a wider array are read in place."""
    device = DEVICES[-1] if not is_interpreting() else "cpu"
    arrays = problem((4, 96), "bfloat16", device, offset=64.0)
    check(kernel(*arrays, 1e-6), arrays, "bfloat16", 1e-6)
    wide = problem((6, 200), "float32", device)
    parts = [wide[0][:, 3:99], wide[1].T[:96].T[:6, :96], wide[2][:96], wide[3][:96]]
    check(kernel(*parts, 1e-6), parts, "float32", 1e-6)
    columns = problem((96, 6), "float32", device)
    turned = [columns[0].T, columns[1].T, wide[2][:96], wide[3][:96]]
    check(kernel(*turned, 1e-6), turned, "float32", 1e-6)


@needs_kernel
def test_nan_stays_in_its_row():
    device = DEVICES[-1] if not is_interpreting() else "cpu"
    x, r, w, b = problem((3, 40), "float32", device)
    x[1, 7] = float("nan")
    got = kernel(x, r, w, b, 1e-6)
    assert got[1].isnan().all()
    assert not got[[0, 2]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_op(dtype, device):
    arrays = problem((2, 5, 48), dtype, device)
    out = residual_norm(*arrays, 1e-5)
    assert out.shape == (2, 5, 48)
    want = truth(*arrays, 1e-5)
    error = np.abs(out.double().cpu().numpy() - want)
    assert (error <= 8 * EPS[dtype] * (1 + np.abs(want))).all()  # torch rounds the sum first
    torch.library.opcheck(torch.ops.maskgit.residual_norm.default, (*arrays, 1e-5))


def test_mixed_dtypes_are_torchs():
    x, r, w, b = problem((4, 48), "float32", DEVICES[-1])
    got = residual_norm(x, r.bfloat16(), w, b, 1e-5)
    torch.testing.assert_close(
        got, torch.nn.functional.layer_norm(x + r.bfloat16(), (48,), w, b, 1e-5)
    )
