"""The steps of diffusers' `EntropyBoundScheduler` and `DiscreteDDIMScheduler`: no mask token.

Under uniform corruption a position that is not decided holds a random id.  The draw, its score and the
count are those of the contract, on positions that all count as masked; what they leave masked gets ids
from a stream of its own of the same seeds.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from ...kernels.common.philox import STREAM_CHOICE, STREAM_REPLACE
from ...kernels.decode_step import StepNoise, StepRule, commit_tokens, sample_tokens
from ...kernels.decode_step.api import seeds_like
from ..patching import as_number
from .common import backend_of, next_call, output_class, seeds_of

_UNDECIDED = -1


def entropy_bound_step(
    self: Any,
    model_output: Any,
    timestep: Any,
    sample: Any,
    *,
    entropy_bound: float | None = None,
    generator: Any = None,
    return_dict: bool = True,
    seeds: Any = None,
    noise: StepNoise | None = None,
    random_tokens: Any = None,
    backend: str | None = None,
) -> Any:
    """Draw every position, keep the surest under the bound, replace the rest, as diffusers' own.

    Args beyond diffusers':
        seeds: (B,) 64-bit integers in place of the generator's.
        noise: the caller's own Gumbel noise, (B, N, V); random ids then come from the generator.
        random_tokens: (B, N) ids for the positions that are not kept.
        backend: as in `maskgit.decode_step`.
    """
    bound = self.config.entropy_bound if entropy_bound is None else entropy_bound
    rule = _bound_rule(as_number("entropy_bound", bound))
    left = (self.num_inference_steps - int(timestep)) / self.num_inference_steps
    logits = model_output / (self.config.t_min + (self.config.t_max - self.config.t_min) * left)
    name, number = backend_of(self, backend), next_call(self)
    if noise is None:
        seeds = seeds_of(self, seeds, len(sample), generator, sample.device)
    drawn, score, log_z = sample_tokens(
        logits, rule=rule, seeds=seeds, step=number, noise=noise, backend=name
    )
    if logits.dtype.itemsize < 4:
        accepted = _accepted_in_half(logits, float(bound)) & (drawn >= 0)
    else:
        open_ = sample.new_full(sample.shape, _UNDECIDED)
        numbers = {"mask_token_id": _UNDECIDED, "step": 0, "num_steps": 1}
        kept = commit_tokens(drawn, score, open_, rule=rule, backend=name, **numbers)
        accepted = kept.next_tokens != _UNDECIDED
    if random_tokens is None:
        random_tokens = random_ids(seeds, sample, number, logits.shape[-1], generator)
    chosen = logits.gather(-1, drawn.clamp(min=0)[..., None])[..., 0].float()
    prob = (chosen - log_z).exp().where(drawn >= 0, 0.0)
    values = (drawn.where(accepted, random_tokens), accepted, drawn, prob, logits)
    return output_class(type(self))(*values) if return_dict else values


def _accepted_in_half(logits: Any, bound: float) -> Any:
    """(B, N) bool, entropies and their sums rounded at every operation, as in diffusers' own."""
    import torch

    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    entropy, order = entropy.nan_to_num(nan=torch.inf).sort(dim=-1)
    within = entropy.cumsum(-1) - entropy <= bound
    return torch.zeros_like(within).scatter(-1, order, within)


def discrete_ddim_step(
    self: Any,
    model_output: Any,
    timestep: Any,
    sample: Any,
    *,
    temperature: float = 0.0,
    generator: Any = None,
    return_dict: bool = True,
    seeds: Any = None,
    noise: StepNoise | None = None,
    random_tokens: Any = None,
    backend: str | None = None,
) -> Any:
    """Every position takes its candidate, stays, or is replaced, as diffusers' own.

    Args beyond diffusers':
        noise: the caller's own Gumbel noise: token_gumbel (B, N, V), and choice_gumbel (B, N, 3) of
            the three ways in this order; random ids then come from the generator.
        seeds, random_tokens, backend: as in `entropy_bound_step`.
    """
    import torch

    rule = _clean_rule(as_number("temperature", temperature))
    name, number = backend_of(self, backend), next_call(self)
    if noise is None:
        seeds = seeds_of(self, seeds, len(sample), generator, sample.device)
        gumbels, token_noise = _gumbels(seeds, sample, number), None
    else:
        gumbels = noise.choice_gumbel
        token_noise = StepNoise(noise.token_gumbel) if temperature > 0 else None
    vocab = int(model_output.shape[-1])
    drawn, prob, _ = sample_tokens(
        model_output, rule=rule, seeds=seeds, step=number, noise=token_noise, backend=name
    )
    same, other = (
        torch.tensor(chances, device=sample.device).log()
        for chances in ways(int(timestep), self.num_inference_steps, vocab)
    )
    way = (torch.where((drawn == sample)[..., None], same, other) + gumbels).argmax(-1)
    if random_tokens is None:
        random_tokens = random_ids(seeds, sample, number, vocab, generator)
    after = drawn.where((way == 0) & (drawn >= 0), sample)
    values = (random_tokens.where(way == 2, after), drawn, prob, model_output)
    return output_class(type(self))(*values) if return_dict else values


def ways(step: int, num_steps: int, vocab: int) -> tuple[list[float], list[float]]:
    """Chances of (candidate, token held, random id), where the first two are equal and where not.

    With b the share of clean tokens after the step and a b the share before it, the posterior of the
    uniform kernel (arXiv 2107.03006) has the masses b (1 - a) / V (and a b more where they are equal),
    a (1 - b) / V and (1 - a)(1 - b) / V.
    """
    b, a = (step + 1) / num_steps, step / (step + 1)
    stay, replaced = a * (1 - b), (1 - a) * (1 - b)
    chances = []
    for clean in (b * (1 - a) + vocab * a * b, b * (1 - a)):
        total = clean + stay + replaced
        chances.append([clean / total, stay / total, replaced / total])
    return chances[0], chances[1]


def random_ids(seeds: Any, sample: Any, step: int, vocab: int, generator: Any) -> Any:
    """(B, N) ids below `vocab`, from the sequences' seeds, or without any from the generator."""
    import torch

    from ...kernels.common.philox.torch_form import integers

    if seeds is None:
        return torch.randint(0, vocab, sample.shape, device=sample.device, generator=generator)
    return integers(*_keys(seeds, sample), step, STREAM_REPLACE, vocab)


def _gumbels(seeds: Any, sample: Any, step: int) -> Any:
    """(B, N, 3) standard Gumbel variates."""
    from ...kernels.common.philox.torch_form import gumbel

    return gumbel(*_keys(seeds, sample), step, STREAM_CHOICE, 3)


def _keys(seeds: Any, sample: Any) -> tuple[Any, Any]:
    """The seeds' key words, (B, 2), and the positions, (B, N)."""
    import torch

    from ...kernels.decode_step.inputs import key_words

    place = torch.arange(sample.shape[1], device=sample.device).expand(sample.shape)
    return key_words(seeds_like(seeds, sample)), place


@lru_cache(maxsize=64)
def _bound_rule(bound: float) -> StepRule:
    """The preset on logits that are divided by the temperature already."""
    return replace(
        StepRule.preset("entropy-bound"), threshold=bound, sample_temperature=1.0,
        sample_anneal="constant", sample_temperature_end=0.0, score_temperature=1.0,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _clean_rule(temperature: float) -> StepRule:
    return StepRule(sample_temperature=temperature, score="prob", score_temperature=1.0)
