"""The benchmarks of gpu.py: each yields rows, which are kept as they come.

Keys that all rows of a benchmark have: what was measured, then seconds of ours and of each peer by name.
A peer that cannot run leaves its message instead.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from .timing import Bench

Row = dict[str, Any]


def bench_step(bench: Bench) -> Iterator[Row]:
    """Draw and score of rows of logits against other samplers, cold cache."""
    import torch

    import maskgit

    rate = bench.copy_rate()
    seeds = torch.tensor([1], device=bench.device)
    rules = {
        mode: maskgit.StepRule(score="prob", sample_temperature=temperature)
        for mode, temperature in (("greedy", 0.0), ("draw", 1.0))
    }
    shapes = ((256, 126464), (2048, 50304), (8192, 8192), (65536, 1024), (256, 8192))
    for dtype in ("bfloat16", "float32"):
        for rows, vocab in bench.some(shapes):
            rows, vocab = bench.size(rows, 4), bench.size(vocab, 300)
            inputs = bench.inputs(1, rows, vocab, dtype=dtype)
            gate(inputs[0])
            size = inputs[0].numel() * inputs[0].element_size()
            for mode, rule in rules.items():
                if bench.is_over():
                    return

                def ours(i: int, rule: Any = rule, inputs: Any = inputs) -> Any:
                    return maskgit.sample_tokens(inputs[i % len(inputs)], rule=rule, seeds=seeds)

                taken = bench.samples(ours)
                best = statistics.median(taken)
                row: Row = {
                    "shape": [rows, vocab], "dtype": dtype, "mode": mode, "bytes": size, "maskgit": best,
                    "spread": (max(taken) - min(taken)) / best, "share_of_copy": size / best / rate,
                    "extra_share": bench.peak_bytes(ours) / size,
                }  # fmt: skip
                is_compiled = dtype == "bfloat16" and vocab in (126464, 8192) and rows < 10_000
                for name, peer in _samplers(mode, is_compiled).items():
                    row[name] = attempt(
                        lambda: bench.seconds(lambda i: peer(inputs[i % len(inputs)][0]), 0.1)
                    )
                yield row


def attempt(measure: Callable[[], float]) -> float | str:
    """Seconds, or why there are none."""
    import torch

    try:
        return measure()
    except Exception as error:  # a peer may refuse in any way
        torch.cuda.empty_cache()
        return (str(error) or type(error).__name__).splitlines()[0][:80]


def _eager(mode: str) -> Callable[[Any], Any]:
    """Draw and score as they are usually written, of (R, V) logits."""
    import torch

    def sample(x: Any) -> Any:
        p = x.float().softmax(-1)
        i = p.argmax(-1, keepdim=True) if mode == "greedy" else torch.multinomial(p, 1)
        return i, p.gather(-1, i)

    return sample


def _race(x: Any) -> Any:
    """The exponential race that compiles into few kernels."""
    import torch

    p = x.float().softmax(-1)
    i = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return i, p.gather(-1, i)


def _llada(x: Any) -> Any:
    """LLaDA's: Gumbel noise in float64."""
    import torch

    wide = x.double()
    i = (wide.exp() / -torch.rand_like(wide).log()).argmax(-1, keepdim=True)
    return i, x.softmax(-1).gather(-1, i)


def _samplers(mode: str, is_compiled: bool) -> dict[str, Callable[[Any], Any]]:
    """What people use on (R, V) logits; compiled where it is asked for, since each shape takes seconds."""
    import torch

    found = {"eager": _eager(mode)}
    if is_compiled and torch.cuda.is_available():
        torch._dynamo.reset()  # each shape is compiled for itself
        best = _eager(mode) if mode == "greedy" else _race
        found["compiled"] = torch.compile(best, dynamic=False)
    if mode == "draw":
        found |= {"eager race": _race, "float64 Gumbel": _llada}
        try:
            from flashinfer.sampling import sampling_from_logits

            found["flashinfer"] = sampling_from_logits
        except ImportError:
            pass
    return found


def gate(logits: Any) -> None:
    """AssertionError unless some rows are drawn and scored as the float64 reference does."""
    import torch

    import maskgit

    few = logits[:, :8]
    for temperature in (0.0, 1.0):
        rule = maskgit.StepRule(score="prob", sample_temperature=temperature)
        got = maskgit.sample_tokens(few, rule=rule, seeds=[1])
        want = maskgit.sample_tokens(few, rule=rule, seeds=[1], backend="reference")
        same = got.candidate_tokens == want.candidate_tokens
        share = same.float().mean()
        assert share >= 0.8, f"only {share:.2f} of the candidates are the reference's"
        torch.testing.assert_close(
            got.confidence[same], want.confidence[same], rtol=1e-3, atol=1e-6
        )


def bench_graph(bench: Bench) -> Iterator[Row]:
    """Whole decode steps in CUDA graphs: one alone, and one of 16 as in a generation."""
    import torch

    import maskgit

    for batch, length, vocab in bench.some(((1, 256, 1024), (1, 32, 152064), (64, 256, 1024))):
        length, vocab = bench.size(length, 8), bench.size(vocab, 300)
        logits = bench.rand(batch, length, vocab)
        tokens = torch.full((batch, length), vocab, device=bench.device)
        seeds = torch.arange(batch, device=bench.device)
        start = torch.full_like(seeds, length)

        def step() -> Any:
            return maskgit.decode_step(
                logits, tokens, rule="maskgit", mask_token_id=vocab, step=1, num_steps=8,
                num_masked_at_start=start, seeds=seeds,
            )  # fmt: skip

        steps = bench.size(16, 1)

        def many() -> None:
            for _ in range(steps):
                step()

        yield {
            "shape": [batch, length, vocab], "kernels": bench.num_kernels(lambda i: step()),
            "maskgit": bench.seconds(bench.graphed(many)) / steps,
            "graph of one": bench.seconds(bench.graphed(step)),
            "without a graph, host included": bench.latency(lambda i: step(), bench.size(50, 1)),
        }  # fmt: skip


def bench_head(bench: Bench) -> Iterator[Row]:
    """The head without logits against a product and samplers of its logits."""
    import torch

    import maskgit

    width, vocab = bench.size(4096, 32), bench.size(126464, 300)
    weight = bench.rand(vocab, width, scale=0.02)
    size, rate, ceiling = (
        weight.numel() * weight.element_size(),
        bench.copy_rate(),
        bench.product_rate(),
    )
    options = {"rule": maskgit.StepRule(score="prob"), "mask_token_id": vocab, "step": 0,
               "num_steps": 2, "seeds": torch.tensor([1], device=bench.device)}  # fmt: skip
    for rows in bench.some((32, 64, 256, 1024, 4096)):
        rows = bench.size(rows, 8)
        hidden = bench.rand(1, rows, width)
        for share in (1.0, 0.5):
            if bench.is_over():
                return
            tokens = torch.full((1, rows), vocab, device=bench.device)
            tokens[:, int(rows * share) :] = 0

            def fused(i: int) -> Any:
                return maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)

            def apart(i: int) -> Any:
                return maskgit.decode_step(hidden @ weight.T, tokens, **options)

            best = bench.seconds(fused)
            flops = 2.0 * rows * share * width * vocab
            row: Row = {
                "rows": rows, "width": width, "vocab": vocab, "masked": share, "maskgit": best,
                "product and our step": bench.seconds(apart), "tflops": flops / best / 1e12,
                "share_of_product": flops / best / ceiling,
                "share_of_weight_read": size / best / rate, "extra_bytes": bench.peak_bytes(fused),
                "extra_bytes_apart": bench.peak_bytes(apart),
            }  # fmt: skip
            if share == 1.0:
                row["product"] = bench.seconds(lambda i: hidden[0] @ weight.T)
                sampler = _eager("draw")
                row["product and eager sampler"] = attempt(
                    lambda: bench.seconds(lambda i: sampler(hidden[0] @ weight.T))
                )
            yield row


def bench_attention(bench: Bench) -> Iterator[Row]:
    """Attention, ours and what `auto` takes, against each of torch's backends, from one packed product."""
    from maskgit.kernels.attention.triton_cuda import launch as triton_cuda
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import maskgit

    peers = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }  # fmt: skip
    for length in bench.some((257, 1025, 64, 4096)):
        for size in (48, 96, 64, 128, 72)[: bench.size(5, 2)]:
            if bench.is_over():
                return
            n, heads = bench.size(length, 17), 768 // size
            batch = 1 if bench.smoke else max(1, 16384 // n)
            dtype = "float32" if bench.device == "cpu" else "bfloat16"
            q, k, v = bench.rand(batch, n, 3, heads, size, dtype=dtype).unbind(2)
            turned = [x.transpose(1, 2) for x in (q, k, v)]
            mine = bench.seconds(lambda i: triton_cuda.attention(q, k, v, None, size**-0.5), 0.1)
            row: Row = {"length": n, "size": size, "batch": batch, "heads": heads, "maskgit": mine}
            for name, kind in peers.items():
                with sdpa_kernel([kind]):
                    row[name] = attempt(lambda: bench.seconds(lambda i: _sdpa(turned), 0.1))
            row["torch"] = bench.seconds(lambda i: _sdpa(turned), 0.1)
            row["auto"] = bench.seconds(lambda i: maskgit.attention(q, k, v), 0.1)
            difference = maskgit.attention(q, k, v, backend="triton").float() - maskgit.attention(
                q, k, v, backend="torch"
            )
            row["difference"] = float(difference.abs().max())
            yield row | {"tflops": 4.0 * q.numel() * n / mine / 1e12}


def _sdpa(turned: Any) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(*turned)


def bench_maskgit(bench: Bench) -> Iterator[Row]:
    """A whole generation by the MaskGIT transformer, random weights: one graph against eager code."""
    import torch

    import maskgit
    from maskgit.models.transformer import MaskGitTransformer
    from maskgit.pipelines.recipes import preset

    for batch, tokens, steps in bench.some(((1, 256, 8), (64, 256, 8), (1, 1024, 12))):
        if bench.is_over():
            return
        config = dataclasses.replace(
            preset("maskgit-official").transformer, num_tokens=bench.size(tokens, 16)
        )
        if bench.smoke:
            config = dataclasses.replace(config, num_layers=1)
        kind = torch.float32 if bench.device == "cpu" else torch.bfloat16
        model = MaskGitTransformer(config).to(bench.device, kind).eval()
        batch = bench.size(batch, 2)
        classes = torch.zeros(batch, dtype=torch.int64, device=bench.device)
        start = torch.full((batch, config.num_tokens), config.mask_token_id, device=bench.device)
        seeds = torch.arange(batch, device=bench.device)
        weight, bias = model.head_weight()

        def hidden(x: Any) -> Any:
            return model.head.project(model.hidden(x, classes))

        def run(i: int) -> Any:
            return maskgit.generate(
                hidden, start, rule="maskgit", mask_token_id=config.mask_token_id, num_steps=steps,
                seeds=seeds, head_weight=weight, head_bias=bias, cuda_graph=bench.device == "cuda",
            ).tokens  # fmt: skip

        with torch.no_grad():
            yield {
                "batch": batch, "tokens": config.num_tokens, "steps": steps, "maskgit": bench.latency(run),
                "eager": bench.latency(lambda i: _eager_generation(model, start, classes, steps)),
                "kernels of a forward": bench.num_kernels(lambda i: model.hidden(start, classes)),
                "seconds of a forward": bench.seconds(
                    bench.graphed(lambda: model.hidden(start, classes))
                ),
            }  # fmt: skip


def _eager_generation(model: Any, start: Any, classes: Any, steps: int) -> Any:
    """MaskGIT's loop as people write it in torch, on a forward with our LayerNorm kernel."""
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


def bench_tokens(bench: Bench) -> Iterator[Row]:
    """The same seeds here and on the CPU: how many tokens differ; tests/backends/test_cuda.py audits them."""
    import torch

    import maskgit

    shapes = ((2, 64, 50304), (16, 256, 1024), (1, 32, 126464))
    for rule in ("maskgit", "llada", "mdlm", "dream-entropy"):
        for batch, length, vocab in bench.some(shapes):
            if bench.is_over():
                return
            length, vocab = bench.size(length, 8), bench.size(vocab, 300)
            logits = bench.rand(batch, length, vocab, dtype="float32", scale=2.0)
            tokens = torch.full((batch, length), vocab, device=bench.device)
            found = [
                maskgit.decode_step(
                    logits.to(device), tokens.to(device), rule=rule, mask_token_id=vocab, step=1,
                    num_steps=8, seeds=torch.arange(batch, device=device), backend=backend,
                    num_masked_at_start=length,
                )
                for device, backend in ((bench.device, "auto"), ("cpu", "torch"))
            ]  # fmt: skip
            rows = {"rule": rule, "shape": [batch, length, vocab], "positions": batch * length}
            yield rows | {
                name: int((getattr(found[0], name).cpu() != getattr(found[1], name)).sum())
                for name in ("candidate_tokens", "next_tokens")
            }


def bench_probe(bench: Bench) -> Iterator[Row]:
    """One small call of every kernel, without timing: what compute-sanitizer watches."""
    import torch
    from maskgit.kernels.common.tuning import forced

    import maskgit

    dtype = "float32" if bench.device == "cpu" else "bfloat16"
    for rule in bench.some(("maskgit", "dream-entropy", "muse-critic", "entropy-bound")):
        for length, vocab, offset in ((bench.size(24, 4), 200, 0), (3, 5000, 3)):
            logits = bench.rand(2, length, vocab + 8, dtype=dtype)[..., offset : offset + vocab]
            tokens = torch.full((2, length), vocab, device=bench.device)
            options: Row = {"rule": rule, "mask_token_id": vocab, "step": 1, "num_steps": 4,
                            "num_masked_at_start": length,
                            "seeds": torch.arange(2, device=bench.device)}  # fmt: skip
            if maskgit.StepRule.preset(rule).score == "given":
                options["scores"] = bench.rand(2, length, dtype="float32")
            with forced("decode_step", {"leaves": 4, "programs": bench.size(64, 8)}):
                out = maskgit.decode_step(logits, tokens, **options)
                guided = {"uncond_logits": logits.flip(0), "guidance_scale": 2.0}
                maskgit.decode_step(logits, tokens, **options, **guided)
            yield {"rule": rule, "vocab": vocab, "drawn": int((out.candidate_tokens >= 0).sum())}
    hidden, weight = bench.rand(1, 130, 64, dtype=dtype), bench.rand(300, 64, dtype=dtype)
    tokens = torch.full((1, 130), 300, device=bench.device)
    options = {"rule": "maskgit", "mask_token_id": 300, "step": 1, "num_steps": 4, "seeds": [1]}
    for rows in (40, 8, bench.size(130, 9)):
        options["num_masked_at_start"] = rows
        maskgit.decode_step_from_hidden(hidden[:, :rows], weight, tokens[:, :rows], **options)
    long = torch.randint(0, 9, (1, bench.size(1100, 20)), device=bench.device)
    given = maskgit.StepRule(score="given", cut="strict", choice_temperature=0.0)
    maskgit.commit_tokens(
        long,
        long.float(),
        long * 0 + 9,
        rule=given,
        mask_token_id=9,
        step=1,
        num_steps=4,
        num_masked_at_start=long.shape[1],
    )
    q = bench.rand(2, 33, 3, 2, 48, dtype=dtype)
    out = maskgit.attention(*q.unbind(2), backend="triton")
    yield {"head": "done", "attention": float(out.float().abs().max())}


BENCHES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "step": bench_step, "graph": bench_graph, "head": bench_head, "attention": bench_attention,
    "maskgit": bench_maskgit, "tokens": bench_tokens,
}  # fmt: skip
