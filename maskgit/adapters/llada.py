"""LLaDA (ML-GSAI/LLaDA at b7e6c356): `generate` of its module generate.py.

    import generate as llada                            # the codebase's own file
    with maskgit.adapters.fast_sampler(llada) as handle:
        out = llada.generate(model, prompt, steps=128, gen_length=128, block_length=32,
                             temperature=0.5, cfg_scale=0.0, remasking="low_confidence")
    print(handle.report)

Replaced: `generate`, on that module.  The same function can be called without patching:
`maskgit.adapters.llada.generate(model, prompt, ...)`, with the same arguments, in the same order.
What stays: the network, the tokenizer, the mask id, the blocks and their quotas, guidance, both ways
of remasking, the two options for end tokens with what they really do (at temperature above 0
`confidence_eos_eot_inf` keeps only the end-of-turn id from being sure).  With `fixed=True` both end
tokens are kept from being sure at any temperature, and the mask id is never drawn.

The versions since 2025-02 are told apart by their code (`VERSIONS`; those before f51cb17 score in
float64); others are refused.  Arguments that are left out have the defaults of the module's own
`generate`, and the ids of the end tokens are those in its code.

Where the model's last layer is a plain linear one, and the model does nothing after it, it is left out
of the forward pass and applied to the masked positions of the active block alone, guidance mixed on
its input: no (B, N, V) logits, no float64 copies.  Otherwise the model's logits are used as they are;
`report.notes` says which.  In half precision guided logits are then rounded once, where theirs are
rounded three times; `hidden_states=False` rounds as theirs.

What differs: random numbers come from one 64-bit seed per sequence, drawn in every call from torch's
generator (or given as `seeds`): the same law, drawn exactly where theirs stops at 2^-24 or 2^-53;
they belong to a token's place among the real tokens of its row, so that a left-padded row draws
what it draws alone.  Equal confidences commit the lower position, where torch.topk's choice is open.
A position without a finite logit stays masked, where theirs takes id 0 at once.
A step with nothing left to fill does not call the model.  cfg_scale > 0 without an attention mask,
which raises NameError there, works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..kernels.common.arrays import as_index, kind_of
from ..kernels.decode_step import StepNoise, StepRule
from ..sampling.loop import generate as run_steps
from .fingerprint import AdapterError, check_signature, check_version, names_in, read_ids
from .lazy_head import Head, output_layer
from .patching import Handle, Report, as_count, as_number, draw_seeds

_CODEBASE = "ML-GSAI/LLaDA@b7e6c3565f194352da44b38dd12b6970597309f3 generate.py"
_OLD = "model, prompt, steps, gen_length, block_length, temperature, cfg_scale, remasking, mask_id"
_NEW = (
    "model, prompt, attention_mask, steps, gen_length, block_length, temperature, cfg_scale, "
    "remasking, mask_id, logits_eos_inf, confidence_eos_eot_inf"
)
# Of the end tokens whose logits, noisy logits and again logits are -inf: EOS, EOS, end of turn.
END_TOKENS = (126081, 126081, 126348)
_REMASKING = ("low_confidence", "random")
_HELPERS = {
    "add_gumbel_noise": "16b0ccd4bf8ab75d",
    "get_num_transfer_tokens": "26ce3d07c22a9725",
}
VERSIONS = {
    "b7e6c356": {"generate": "92b63d313ec6cbbe"} | _HELPERS,
    "f51cb17": {"generate": "6ffba9eacdf709b5"} | _HELPERS,
    "d5634da": {"generate": "e1c02c9c12d9f573"} | _HELPERS,
    "4fc3cd2": {"generate": "e1c02c9c12d9f573"}
    | _HELPERS
    | {"add_gumbel_noise": "ecfdb0b359002590"},
}


def matches(target: Any) -> bool:
    """Whether the target is a module with LLaDA's three functions."""
    names = ("generate", *_HELPERS)
    return (
        inspect.ismodule(target)
        and all(callable(getattr(target, n, None)) for n in names)
        and (not hasattr(target, "get_transfer_index"))
    )


def install(
    target: Any,
    *,
    noise: Callable[[int], StepNoise] | None = None,
    hidden_states: bool = True,
    fixed: bool = False,
    backend: str = "auto",
    trust_version: bool = False,
) -> Handle:
    """Replace `generate` of the module; it takes `seeds` too.

    Args:
        target: the module of generate.py.
        noise: called with the number of the step, returns the `StepNoise` to use (for tests).
        hidden_states: whether to leave the last layer out where that is possible.
        fixed: whether to repair what looks like a mistake (see the head of this file).
        backend: as in `decode_step`.
        trust_version: whether a target whose code is not known is taken for a known one.
    """
    if not matches(target):
        raise AdapterError(
            "target: expected the module of LLaDA's generate.py, with generate, add_gumbel_noise "
            "and get_num_transfer_tokens"
        )
    version = version_of(target, trust_version)
    report = Report("llada", _CODEBASE, version)
    handle = Handle(target, report)
    options: dict[str, Any] = {"noise": noise, "backend": backend, "hidden_states": hidden_states}
    options |= {"fixed": fixed, "report": report, "end_tokens": _end_tokens(target.generate)}
    options["score_dtype"] = "float64" if "float64" in names_in(target.generate) else "logits"

    def call(_: Any, **kwargs: Any) -> Any:
        return generate(**(options | kwargs))

    call.__doc__ = generate.__doc__
    handle.replace_method("generate", call)
    return handle


def version_of(target: Any, trusted: bool = False) -> str:
    """Which of the known versions the module holds; AdapterError for others, unless trusted."""
    is_new = "attention_mask" in inspect.signature(target.generate).parameters
    check_signature(target.generate, _NEW if is_new else _OLD, "LLaDA's generate")
    return check_version(
        target,
        ("generate",),
        VERSIONS,
        what="LLaDA's generate.py",
        trusted=trusted,
        ids_in="generate",
    )


def _end_tokens(function: Any) -> tuple[int, ...]:
    """Those of the code of their `generate`; LLaDA's own where it names none."""
    ids = read_ids(function) or END_TOKENS
    if len(ids) != len(END_TOKENS):
        raise AdapterError(f"target: expected three ids of end tokens in generate, got {ids}")
    return ids


@lru_cache(maxsize=64)
def rule_for(
    temperature: float,
    remasking: str,
    score_dtype: str,
    banned: tuple[int, ...],
    quiet: tuple[int, ...],
    fixed: bool = False,
) -> StepRule:
    """The `StepRule` of a call's arguments."""
    fields: dict[str, Any] = {"sample_temperature": float(temperature), "banned_ids": banned}
    if fixed:
        fields["ban_mask_token"] = True
    if remasking == "random":
        return StepRule(**(_fields("random") | fields))
    fields |= {"score_dtype": score_dtype, "guidance_dtype": "logits", "score_banned_ids": quiet}
    return StepRule(**(_fields("llada") | fields))


def _fields(preset: str) -> dict[str, Any]:
    return {k: v for k, v in vars(StepRule.preset(preset)).items() if not k.startswith("_")}


def generate(
    model: Any,
    prompt: Any,
    attention_mask: Any = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    seeds: Any = None,
    noise: Callable[[int], StepNoise] | None = None,
    backend: str = "auto",
    hidden_states: bool = True,
    fixed: bool = False,
    score_dtype: str = "logits",
    end_tokens: tuple[int, ...] = END_TOKENS,
    report: Report | None = None,
) -> Any:
    """LLaDA's `generate`: prompt (B, L) with `gen_length` tokens after it, (B, L + gen_length).

    The positional arguments are the original's.  `seeds`: (B,) 64-bit integers, by default drawn
    from torch's generator.  `attention_mask` (B, L): 0 at padding, as the original's.  `noise`,
    `hidden_states`, `fixed` and `backend`: see `install`.  `end_tokens`: see `END_TOKENS`.

    Raises:
        ValueError: lengths or steps that do not divide, an unknown `remasking`.
    """
    import torch

    _check_tensors(prompt, attention_mask)
    steps, gen_length, block_length = _counts(steps, gen_length, block_length)
    temperature = as_number("temperature", temperature)
    cfg_scale = as_number("cfg_scale", cfg_scale)
    if remasking not in _REMASKING:
        raise ValueError(f"remasking: expected {' or '.join(_REMASKING)}, got {remasking!r}")
    report = Report("llada", _CODEBASE, "called directly") if report is None else report
    mask_id = as_index("mask_id", mask_id)
    batch, length = prompt.shape
    device = getattr(model, "device", prompt.device)
    x = torch.full((batch, length + gen_length), mask_id, dtype=torch.long, device=device)
    x[:, :length] = prompt
    if attention_mask is not None:
        more = torch.ones((batch, gen_length), dtype=attention_mask.dtype, device=device)
        attention_mask = torch.cat([attention_mask.to(device), more], dim=-1)
    if seeds is None and noise is None:
        seeds = draw_seeds(batch, None, device)
    head = Head(output_layer(model), report.note, wanted=hidden_states)
    forward = _Forward(model, x != mask_id, mask_id, attention_mask, cfg_scale, head)
    quiet: tuple[int, ...] = ()
    if confidence_eos_eot_inf:
        quiet = end_tokens[1:] if temperature == 0 or fixed else end_tokens[2:]
    banned = end_tokens[:1] if logits_eos_inf else ()
    with torch.no_grad():
        forward.begin(x)  # tells whether hidden states will do
        out = run_steps(
            forward,
            x,
            rule=rule_for(temperature, remasking, score_dtype, banned, quiet, fixed),
            mask_token_id=mask_id,
            num_steps=steps,
            seeds=seeds,
            guidance_scale=cfg_scale + 1.0 if cfg_scale > 0.0 else None,
            backend=backend,
            block_length=block_length,
            prompt_length=length,
            positions=_positions(attention_mask, x),
            head_weight=lambda: head.weight,  # None from the pass on that makes logits
            head_bias=lambda: head.bias,
            noise=noise,
        )
    return out.tokens


class _Forward:
    """The model on tokens: logits or hidden states, with guidance a pair."""

    def __init__(
        self, model: Any, given: Any, mask_id: int, attention_mask: Any, scale: float, head: Head
    ):
        self.model, self.given, self.mask_id = model, given, mask_id
        self.attention_mask, self.scale, self.head = attention_mask, scale, head
        self.first: Any = None

    def begin(self, tokens: Any) -> None:
        """Run the first pass; the first call returns it."""
        if tokens.shape[0]:
            self.first = self(tokens)

    def __call__(self, tokens: Any) -> Any:
        import torch

        if self.first is not None:
            out, self.first = self.first, None
            return out
        if self.scale <= 0.0:
            return self._run(tokens, self.attention_mask)
        uncond = torch.where(self.given, self.mask_id, tokens)
        mask = self.attention_mask
        both = self._run(
            torch.cat([tokens, uncond]), None if mask is None else torch.cat([mask, mask])
        )
        return tuple(torch.chunk(both, 2))

    def _run(self, tokens: Any, mask: Any) -> Any:
        options = {} if mask is None else {"attention_mask": mask}
        return self.head.run(lambda: self.model(tokens, **options).logits)[0]


def _positions(attention_mask: Any, x: Any) -> Any:
    """Each token's place among the real tokens of its row; None without padding."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)


def _check_tensors(prompt: Any, attention_mask: Any) -> None:
    for name, x in (("prompt", prompt), ("attention_mask", attention_mask)):
        if name == "attention_mask" and x is None:
            continue
        if kind_of(x) != "torch":
            raise TypeError(f"{name}: expected a torch tensor, got {type(x).__name__}")
        if x.ndim != 2 or x.shape != prompt.shape:
            like = (
                "shape (B, L)" if name == "prompt" else f"the prompt's shape {tuple(prompt.shape)}"
            )
            raise ValueError(f"{name}: expected {like}, got {tuple(x.shape)}")


def _counts(steps: Any, gen_length: Any, block_length: Any) -> tuple[int, int, int]:
    """The three as Python's integers; ValueError unless they divide as they must."""
    steps, gen_length = as_count("steps", steps), as_count("gen_length", gen_length)
    block_length = as_count("block_length", block_length)
    if gen_length % block_length:
        raise ValueError(
            f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    return steps, gen_length, block_length
