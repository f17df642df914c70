"""`attention` on every backend against float64, with the error of torch's own as the measure."""

import numpy as np
import pytest
from helpers import native
from maskgit.kernels.common.backends import is_interpreting

import maskgit

BACKENDS = [
    name
    for name in ("reference", "torch", "jax", "triton")
    if maskgit.available_backends()[name] is None
]
SIZES = [48, 64, 72, 96, 128]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}


def problem(batch=2, queries=33, keys=None, heads=2, groups=None, size=48, seed=0):
    rng, keys = np.random.default_rng(seed), queries if keys is None else keys
    q = rng.normal(size=(batch, queries, heads, size)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, keys, groups or heads, size)).astype(np.float32)
    return [q, k, v]


def truth(q, k, v, padding=None, scale=None):
    """Float64, row by row, written without the library."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        keep = slice(None) if padding is None else ~padding[b]
        keys, values = k[b, keep, h // group], v[b, keep, h // group]
        if len(keys):
            s = q[b, :, h] @ keys.T * scale
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b, :, h] = p / p.sum(-1, keepdims=True) @ values
    return out


def usable(backend, dtype):
    """On a GPU the kernel takes 16 bits alone."""
    is_gpu = backend == "triton" and not is_interpreting()
    return "float16" if is_gpu and dtype == "float32" else dtype


def run(arrays, backend, dtype="float32", padding=None, **options):
    dtype = usable(backend, dtype)
    kind = {
        "jax": "jax",
        "pallas": "jax",
        "reference": "torch" if dtype == "bfloat16" else "numpy",
    }.get(backend, "torch")
    q, k, v = (native(x, kind, dtype) for x in arrays)
    mask = None if padding is None else native(padding, kind)
    out = maskgit.attention(q, k, v, key_padding_mask=mask, backend=backend, **options)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    back = out.float() if kind == "torch" else out.astype("float32")
    return [
        np.asarray(x.float() if kind == "torch" else x, np.float32) for x in (q, k, v)
    ], np.asarray(back)


def check(arrays, backend, dtype="float32", padding=None, **options):
    dtype = usable(backend, dtype)
    rounded, got = run(arrays, backend, dtype, padding, **options)
    want = truth(*rounded, padding, **options)
    own = np.abs(run(arrays, "torch", dtype, padding, **options)[1] - want).max(initial=0.0)
    bound = 2 * own + EPS[dtype] * np.abs(want).max(initial=0.0)
    assert np.abs(got - want).max(initial=0.0) <= bound
    assert np.isfinite(got).all()


CASES = [  # Triton's interpreter has no products of bfloat16
    (backend, dtype)
    for backend in BACKENDS
    for dtype in EPS
    if not (backend == "triton" and dtype == "bfloat16" and is_interpreting())
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_every_head_dimension(backend, dtype, size):
    check(problem(size=size, queries=70, batch=1), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (65, 64), (64, 65), (3, 130), (130, 3)])
def test_lengths_around_the_blocks(shape, backend):
    check(problem(queries=shape[0], keys=shape[1]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 8, 16, 24, 33, 160])
def test_odd_head_dimensions(size, backend):
    check(problem(size=size, heads=1), backend, scale=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend):
    check(problem(heads=6, groups=2), backend)
    check(problem(heads=4, groups=1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding(backend):
    """Left, right and middle padding, whole blocks of it, and a sequence of nothing else."""
    padding = np.zeros((5, 150), bool)
    padding[0, :100] = padding[1, 70:] = padding[2, 30:130] = padding[4] = True
    arrays = problem(batch=5, queries=20, keys=150)
    arrays[1][padding] = np.nan  # what is padding may hold anything
    arrays[2][padding] = np.nan
    check(arrays, backend, padding=padding)
    assert (run(arrays, backend, padding=padding)[1][4] == 0).all()
    arrays[1][padding] = np.inf
    check(arrays, backend, padding=padding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = problem()
    check([q * 300, k * 300, v], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(backend):
    assert (run(problem(keys=0), backend)[1] == 0).all()
    for empty in (problem(batch=0), problem(queries=0, keys=5)):
        assert run(empty, backend)[1].size == 0


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("torch", "triton")])
def test_packed_products_are_read_in_place(backend):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, usable(backend, "float32"))
    atol = 2e-6 if kind == torch.float32 else 2e-3
    packed = torch.randn(2, 40, 3, 4, 48).to(kind)
    q, k, v = packed.unbind(2)
    assert not q.is_contiguous()
    got = maskgit.attention(q, k, v, backend=backend)
    want = truth(*(x.numpy() for x in (q, k, v)))
    np.testing.assert_allclose(got.numpy(), want, atol=atol)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    other = maskgit.attention(*heads_first, backend=backend)
    np.testing.assert_allclose(other.numpy(), want, atol=atol)
    gaps = torch.randn(2, 40, 4, 96).to(kind)[..., ::2]
    np.testing.assert_allclose(
        maskgit.attention(gaps, k, v, backend=backend).numpy(),
        truth(gaps.numpy(), k.numpy(), v.numpy()), atol=atol,
    )  # fmt: skip


def test_one_node_of_a_compiled_graph():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 9, 2, 16) for _ in range(3))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[:, 5:] = True

    def call(q, k, v, padding):
        return maskgit.attention(q, k, v, key_padding_mask=padding)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(q, k, v, padding), call(q, k, v, padding))
    longer = [torch.randn(3, 12, 2, 16) for _ in range(3)]
    more = torch.zeros(3, 12, dtype=torch.bool)
    assert torch.equal(compiled(*longer, more), call(*longer, more))
    from maskgit.kernels.attention.ops import attention_op

    torch.library.opcheck(attention_op.overload, (q, k, v, padding, 0.25, "auto"))
    packed = torch.randn(2, 9, 3, 2, 16).unbind(2)
    torch.library.opcheck(attention_op.overload, (*packed, None, 0.25, "torch"))


def test_jax_traces():
    jax = pytest.importorskip("jax")
    arrays = [native(x, "jax") for x in problem()]
    got = jax.jit(maskgit.attention)(*arrays)
    np.testing.assert_allclose(np.asarray(got), truth(*arrays), atol=2e-6)


def test_what_is_refused():
    q, k, v = problem()
    torch = pytest.importorskip("torch")
    for args, options, message in (
        (([[1.0]], k, v), {}, "q: expected a torch, jax or NumPy array, got list"),
        ((q, torch.from_numpy(k), v), {}, "k: expected a numpy array like the others, got Tensor"),
        ((q.astype(float), k, v), {}, "q: expected dtype float16, bfloat16, float32, got float64"),
        ((q, k.astype(np.float16), v), {}, "k: expected dtype float32 like q, got float16"),
        ((q[0], k, v), {}, r"q: expected shape \(B, N, H, D\), got \(33, 2, 48\)"),
        (
            (q, k[:1], v),
            {},
            r"k: expected shape \(2, M, a divisor of 2, 48\), got \(1, 33, 2, 48\)",
        ),
        ((q[:, :, :1], k, v), {}, "k: expected shape"),
        ((q, k, v[:, :5]), {}, r"v: expected shape \(2, 33, 2, 48\) like k"),
        ((q, k, v), {"scale": float("nan")}, "scale: expected a finite number or None, got nan"),
        ((q, k, v), {"scale": True}, "scale: expected a finite number or None, got True"),
        ((q, k, v), {"backend": "abacus"}, "backend: expected auto"),
        ((q, k, v), {"backend": "cpp"}, "backend: 'cpp' cannot run: it has no attention"),
        ((q, k, v), {"backend": "torch"}, "it works on torch arrays, not on numpy"),
        (
            (q, k, v),
            {"key_padding_mask": np.zeros((2, 4), bool)},
            "key_padding_mask: expected bool",
        ),
        ((q, k, v), {"key_padding_mask": np.zeros((2, 33))}, "got float64 of shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            maskgit.attention(*args, **options)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="k: decoding has no gradient"):
        maskgit.attention(*tensors)
