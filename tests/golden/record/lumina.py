"""Alpha-VLLM/Lumina-DiMOO: `generate_image`.

    python tests/golden/record/lumina.py --source <checkout>

Upstream gathers the masked positions of one sequence; its noise is put back in place here (zero
elsewhere).  The image tokens lie behind the text vocabulary: `vocab_slice`.  Newline tokens stand
between the rows of the image as known ones.  Guidance (1 + s) c - s u is ours with 1 + s.
"""

import math

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, bits_of, gumbel_of, source_argument
from text import Model, add, extract, load

V, TEXT, MASK, NEWLINE, START = 16, 6, 40, 1, 4


class Multimodal(Model):
    """What upstream asks of a model beside its logits."""

    def parameters(self):
        return iter([torch.zeros(1)])

    def caching(self, _):
        return None


def record(generate, source, name, rule, *, seed, steps, cfg=0.0, temperature=1.0, known=0,
           dtype="float32"):  # fmt: skip
    """Run `generate_image` on a 4 x 4 image and write one file."""
    rng = np.random.default_rng(seed)
    image = np.full((4, 5), MASK)
    image.reshape(-1)[rng.choice(20, known, replace=False)] = TEXT + 3
    image[:, 4] = NEWLINE
    x = np.concatenate([rng.integers(0, TEXT, START), image.reshape(-1), [2, 2]])[None]
    uncond = rng.integers(0, TEXT, (1, START - 2))
    model = Multimodal(Stub(TEXT + V, x.shape[1], MASK + 1, seed, bits_of(dtype)), dtype)
    prompt = torch.from_numpy(x.copy())
    with TorchNoise(seed, coarse=True) as noise:
        generate(model, prompt, seq_len=16, newline_every=4, timesteps=steps, mask_token_id=MASK,
                 newline_id=NEWLINE, temperature=temperature, cfg_scale=cfg, code_start=START,
                 uncon_ids=torch.from_numpy(uncond), codebook_size=V,
                 text_vocab_size=TEXT)  # fmt: skip
    recorder = Recorder(name, source=source, codebase="Alpha-VLLM/Lumina-DiMOO", rule=rule,
                        function="generate_image", mask_token_id=MASK, dtype=dtype,
                        guidance_scale=1 + cfg if cfg else None)  # fmt: skip
    calls = [model.calls[i :: 2 if cfg else 1] for i in range(2 if cfg else 1)]
    states = [tokens[:, START:-2] for tokens, _ in calls[0]] + [prompt[:, START:-2].numpy()]
    kept = iter(noise.kept)
    for s, (_, logits) in enumerate(calls[0]):
        masked = states[s] == MASK
        token, choice = np.zeros((*masked.shape, V)), np.zeros(masked.shape)
        if temperature:
            token[masked] = gumbel_of(next(kept)[1][0], dtype)
        choice[masked] = gumbel_of(next(kept)[1][0], dtype)
        add(recorder, states[s], states[s + 1], logits=logits[:, START:-2], step=s, num_steps=steps,
            uncond_logits=calls[1][s][1][:, START:-2] if cfg else None,
            num_masked_at_start=(states[0] == MASK).sum(1), choice_gumbel=choice,
            token_gumbel=token if temperature else None)  # fmt: skip
    assert next(kept, None) is None
    recorder.write()


def main():
    source = source_argument()
    utils = load(source / "utils/generation_utils.py")
    generate = extract(
        source / "generators/image_generation_generator.py", "generate_image", math=math,
        LLaDAForMultiModalGeneration=Multimodal, cosine_schedule=utils.cosine_schedule,
        gumbel_max_sample=utils.gumbel_max_sample, mask_by_random_topk=utils.mask_by_random_topk,
    ).generate_image  # fmt: skip
    rule = {"cut": "strict", "last_step": "all", "choice_anneal": "constant",
            "choice_temperature": 1.0, "vocab_slice": [TEXT, TEXT + V]}  # fmt: skip
    record(generate, source, "lumina", rule, seed=1, steps=6)
    record(generate, source, "lumina-cfg", rule, seed=2, steps=5, cfg=3.0, known=3)
    cold = {"sample_temperature": 0.0, "choice_temperature": 0.0}
    record(generate, source, "lumina-greedy", rule | cold, seed=3, steps=6, temperature=0.0)
    warm = {"sample_temperature": 0.5, "choice_temperature": 0.5}
    record(generate, source, "lumina-few", rule | warm, seed=4, steps=12, known=12,
           temperature=0.5)  # fmt: skip
    record(generate, source, "lumina-cfg-bf16", rule, seed=6, steps=6, cfg=4.0, dtype="bfloat16")


if __name__ == "__main__":
    main()
