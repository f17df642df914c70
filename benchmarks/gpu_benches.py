"""The benchmarks of gpu.py: each yields rows, which are kept as they come."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]


class Bench:
    """What the benchmarks share: the device, sizes, timing."""

    def __init__(self, device: str, smoke: bool, until: float) -> None:
        self.device, self.smoke, self.until = device, smoke, until

    def size(self, real: int, toy: int) -> int:
        """The real size, or a toy for --smoke."""
        return toy if self.smoke else real

    def rand(self, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> Any:
        """Normal numbers."""
        import torch

        return (torch.randn(shape, device=self.device) * scale).to(getattr(torch, dtype))

    def inputs(self, *shape: int, dtype: str) -> list[Any]:
        """Enough copies to exceed an L2 cache of 50 MB twice; one for --smoke."""
        first = self.rand(*shape, dtype=dtype, scale=2.0)
        size = first.numel() * first.element_size()
        copies = 1 if self.smoke else max(1, min(64, int(1.2e8 // size) + 1))
        return [first, *(first.roll(i + 1, -1) for i in range(copies - 1))]

    def seconds(self, call: Callable[[int], Any], budget: float = 0.4) -> float:
        """Median seconds of call(i), i = 0, 1, ...: one event pair around each call."""
        import torch

        call(0), call(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call(0)
            return time.perf_counter() - start
        times, start = [], time.monotonic()
        torch.cuda.synchronize()
        while time.monotonic() - start < budget and len(times) < 400:
            pairs = []
            for i in range(20):
                a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                a.record(), call(i), b.record()
                pairs.append((a, b))
            torch.cuda.synchronize()
            times += [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return statistics.median(times)

    def graphed(self, call: Callable[[], Any]) -> Callable[[int], Any]:
        """The call as a CUDA graph's replay."""
        import torch

        if self.device == "cpu":
            return lambda i: call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return lambda i: graph.replay()

    def copy_rate(self) -> float:
        """Bytes a second of a large copy, read and written."""
        import torch

        x = torch.empty(self.size(1 << 29, 1 << 20), dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.numel() / self.seconds(lambda i: y.copy_(x))

    def peak_bytes(self, call: Callable[[int], Any]) -> int:
        """Extra memory at the worst moment of a call."""
        import torch

        if self.device == "cpu":
            return 0
        call(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(1)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until


def bench_step(bench: Bench) -> Iterator[Row]:
    """Draw and score of rows of logits against eager, compiled and other samplers, cold cache."""
    import torch

    import maskgit

    rate = bench.copy_rate()
    for rows, vocab in ((256, 126464), (2048, 50304), (8192, 8192), (65536, 1024)):
        rows, vocab = bench.size(rows, 4), bench.size(vocab, 300)
        for dtype in ("bfloat16", "float32"):
            if bench.is_over():
                return
            inputs = bench.inputs(1, rows, vocab, dtype=dtype)
            gate(bench, inputs[0])
            size = inputs[0].numel() * inputs[0].element_size()
            for mode, rule in (("greedy", maskgit.StepRule(sample_temperature=0.0, score="prob")),
                               ("draw", maskgit.StepRule(score="prob"))):  # fmt: skip
                peers = _peers(mode)

                def ours(i: int, rule: Any = rule, inputs: Any = inputs) -> Any:
                    return maskgit.sample_tokens(inputs[i % len(inputs)], rule=rule, seeds=[1])

                best = bench.seconds(ours)
                row: Row = {
                    "shape": [rows, vocab], "dtype": dtype, "mode": mode, "maskgit": best,
                    "share_of_copy": size / best / rate, "extra_share": bench.peak_bytes(ours) / size,
                }  # fmt: skip
                for name, peer in peers.items():
                    try:
                        took = bench.seconds(lambda i: peer(inputs[i % len(inputs)][0]), 0.2)
                        row[name], row[f"{name} ratio"] = took, took / best
                    except (RuntimeError, torch.OutOfMemoryError) as error:
                        row[name] = str(error).splitlines()[0][:80]
                yield row


def _peers(mode: str) -> dict[str, Callable[[Any], Any]]:
    """What people use, on (R, V) logits."""
    import torch

    def eager(x: Any) -> Any:
        p = x.float().softmax(-1)
        i = p.argmax(-1, keepdim=True) if mode == "greedy" else torch.multinomial(p, 1)
        return i, p.gather(-1, i)

    def gumbel64(x: Any) -> Any:
        wide = x.double()
        noise = torch.rand_like(wide)
        i = (wide.exp() / -noise.log()).argmax(-1, keepdim=True)
        return i, x.softmax(-1).gather(-1, i)

    found: dict[str, Callable[[Any], Any]] = {"eager": eager}
    if torch.cuda.is_available():
        found["compiled"] = torch.compile(eager)
    if mode == "draw":
        found["float64 Gumbel"] = gumbel64
        try:
            from flashinfer.sampling import sampling_from_logits

            found["flashinfer"] = sampling_from_logits
        except ImportError:
            pass
    return found


def gate(bench: Bench, logits: Any) -> None:
    """AssertionError unless some rows are drawn as the float64 reference draws them."""
    import maskgit

    few = logits[:, :8]
    rule = maskgit.StepRule(score="prob")
    got = maskgit.sample_tokens(few, rule=rule, seeds=[1])
    want = maskgit.sample_tokens(few, rule=rule, seeds=[1], backend="reference")
    same = (got.candidate_tokens == want.candidate_tokens).float().mean()
    assert same >= 0.8, f"only {same:.2f} of the candidates are the reference's"


def bench_graph(bench: Bench) -> Iterator[Row]:
    """One whole decode step in a CUDA graph."""
    import torch

    import maskgit

    for shape in ((1, 256, 1024), (1, 32, 152064)):
        batch, length, vocab = (shape[0], bench.size(shape[1], 8), bench.size(shape[2], 300))
        logits = bench.rand(batch, length, vocab)
        tokens = torch.full((batch, length), vocab, device=bench.device)
        seeds = torch.arange(batch, device=bench.device)

        def step(logits: Any = logits, tokens: Any = tokens, seeds: Any = seeds) -> Any:
            return maskgit.decode_step(
                logits, tokens, rule="maskgit", mask_token_id=logits.shape[2], step=1, num_steps=8,
                num_masked_at_start=torch.full_like(seeds, tokens.shape[1]), seeds=seeds,
            )  # fmt: skip

        yield {"shape": [batch, length, vocab], "seconds": bench.seconds(bench.graphed(step))}


def bench_head(bench: Bench) -> Iterator[Row]:
    """The head without logits against cuBLAS and our own step on the logits."""
    import torch

    import maskgit

    width, vocab = bench.size(4096, 32), bench.size(126464, 300)
    weight = bench.rand(vocab, width, scale=0.02)
    size, rate = weight.numel() * weight.element_size(), bench.copy_rate()
    rule = maskgit.StepRule(score="prob")
    for rows in (32, 256, 4096):
        rows = bench.size(rows, 8)
        hidden = bench.rand(1, rows, width)
        for share in (1.0, 0.5):
            if bench.is_over():
                return
            tokens = torch.full((1, rows), vocab, device=bench.device)
            tokens[:, int(rows * share) :] = 0
            options = {
                "rule": rule,
                "mask_token_id": vocab,
                "step": 0,
                "num_steps": 2,
                "seeds": [1],
            }

            def fused(i: int, hidden: Any = hidden, tokens: Any = tokens) -> Any:
                return maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)

            def apart(i: int, hidden: Any = hidden, tokens: Any = tokens) -> Any:
                return maskgit.decode_step(hidden @ weight.T, tokens, **options)

            best, other = bench.seconds(fused), bench.seconds(apart)
            flops = 2.0 * rows * share * width * vocab
            yield {
                "rows": rows, "width": width, "vocab": vocab, "masked": share, "maskgit": best,
                "product and step": other, "ratio": other / best, "tflops": flops / best / 1e12,
                "share_of_weight_read": size / best / (rate / 2), "extra_bytes": bench.peak_bytes(fused),
                "extra_bytes_apart": bench.peak_bytes(apart),
            }  # fmt: skip


def bench_attention(bench: Bench) -> Iterator[Row]:
    """Our attention against torch's, for each block size; the winner of each shape is tuned data."""

    from maskgit.kernels.attention import triton_cuda

    import maskgit

    names = {"tuned": triton_cuda._tuned}
    choices = [
        {"queries": q, "keys": k, "warps": w, "stages": s}
        for q, k, w, s in (
            (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2),
        )
    ]  # fmt: skip
    for length in (64, 257, 577, 1025, 4096):
        for size in (48, 64, 72, 96, 128):
            if bench.is_over():
                return
            n, heads = bench.size(length, 17), 768 // size
            batch = 1 if bench.smoke else max(1, 16384 // n)
            dtype = "float32" if bench.device == "cpu" else "bfloat16"
            q, k, v = bench.rand(batch, n, 3, heads, size, dtype=dtype).unbind(2)
            row: Row = {"length": n, "size": size, "batch": batch, "heads": heads}
            row["torch"] = bench.seconds(lambda i: maskgit.attention(q, k, v, backend="torch"), 0.1)
            timed = []
            for choice in choices[:1] if bench.smoke else choices:
                triton_cuda._tuned = lambda q, k, choice=choice: choice
                try:
                    took = bench.seconds(
                        lambda i: triton_cuda.attention(q, k, v, None, size**-0.5), 0.05
                    )
                    timed.append((took, choice))
                except Exception as error:  # too much shared memory, on this device
                    row[str(choice)] = str(error).splitlines()[0][:80]
            triton_cuda._tuned = names["tuned"]
            best, choice = min(timed, key=lambda t: t[0])
            got = maskgit.attention(q, k, v, backend="triton")
            error = (got.float() - maskgit.attention(q, k, v, backend="torch").float()).abs().max()
            yield row | {
                "maskgit": best, "choice": choice, "ratio": row["torch"] / best, "difference": float(error),
                "tflops": 4.0 * q.numel() * n / best / 1e12,
                "when": {"dtype": dtype, "size": size, "keys": n, "rows": batch * heads},
            }  # fmt: skip


def bench_maskgit(bench: Bench) -> Iterator[Row]:
    """A whole generation by the MaskGIT transformer, random weights: one graph against eager code."""
    import torch

    import maskgit
    from maskgit.config import preset
    from maskgit.model import MaskGitTransformer

    for name, batch, tokens, steps in (("maskgit-official", 1, 256, 8), ("maskgit-official", 64, 256, 8),
                                       ("maskgit-official", 1, 1024, 12)):  # fmt: skip
        if bench.is_over():
            return
        config = dataclasses.replace(preset(name).transformer, num_tokens=bench.size(tokens, 16))
        if bench.smoke:
            config = dataclasses.replace(config, num_layers=1)
        kind = torch.float32 if bench.device == "cpu" else torch.bfloat16
        model = MaskGitTransformer(config).to(bench.device, kind).eval()
        batch = bench.size(batch, 2)
        classes = torch.zeros(batch, dtype=torch.int64, device=bench.device)
        start = torch.full((batch, config.num_tokens), config.mask_token_id, device=bench.device)
        seeds = torch.arange(batch, device=bench.device)
        weight, bias = model.head_weight()

        def hidden(x: Any, model: Any = model, classes: Any = classes) -> Any:
            return model.head.project(model.hidden(x, classes))

        def run(i: int, graph: bool = bench.device == "cuda") -> Any:
            return maskgit.generate(
                hidden, start, rule="maskgit", mask_token_id=config.mask_token_id, num_steps=steps,
                seeds=seeds, head_weight=weight, head_bias=bias, cuda_graph=graph,
            ).tokens  # fmt: skip

        def eager(i: int) -> Any:
            return _eager_generation(model, start, classes, steps)

        with torch.no_grad():
            best, other = bench.seconds(run), bench.seconds(eager)
        yield {
            "model": name, "batch": batch, "tokens": config.num_tokens, "steps": steps, "maskgit": best,
            "eager": other, "ratio": other / best,
        }  # fmt: skip


def _eager_generation(model: Any, start: Any, classes: Any, steps: int) -> Any:
    """MaskGIT's loop as people write it in torch."""
    import torch

    x, mask = start, model.config.mask_token_id
    for s in range(steps):
        p = model(x, classes).float().softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1).view(x.shape)
        score = p.gather(-1, drawn[..., None])[..., 0].log()
        left = 1 - (s + 1) / steps
        score = score - 4.5 * left * torch.log(-torch.log(torch.rand_like(score)))
        score = score.masked_fill(x != mask, torch.inf)
        stay = int(x.shape[1] * left)
        cut = score.sort(-1).values[:, stay : stay + 1]
        x = torch.where(x != mask, x, drawn)
        x = torch.where(score < cut, mask, x)
    return x


BENCHES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "step": bench_step, "graph": bench_graph, "head": bench_head, "attention": bench_attention,
    "maskgit": bench_maskgit,
}  # fmt: skip
