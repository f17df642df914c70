"""An aMUSEd pipeline of diffusers with this library's sampler in it.

    python examples/amused_pipeline.py --out tiny.png                          # tiny and random
    python examples/amused_pipeline.py --model amused/amused-256 --prompt "a cowboy" --out cowboy.png

Needs the extra `diffusers`.
"""

import argparse
from typing import Any

import diffusers
import torch

import maskgit.adapters

CODES, SIDE = 32, 4  # of the tiny pipeline: codebook, tokens a side


def tiny() -> Any:
    """A pipeline with random weights, without a text encoder: prompts are given as embeddings."""
    torch.manual_seed(0)
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=CODES + 1,
        codebook_size=CODES,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        downsample=False,
        upsample=False,
        sample_size=SIDE,
    )
    vqvae = diffusers.VQModel(
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        latent_channels=8,
        up_block_types=["UpDecoderBlock2D"],
        norm_num_groups=4,
        num_vq_embeddings=CODES,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return diffusers.AmusedPipeline(
        scheduler=diffusers.AmusedScheduler(mask_token_id=CODES),
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.eval(),
        vqvae=vqvae.eval(),
    )


def prompt_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is asked for: words, or for the tiny one random embeddings."""
    if given.model is not None:
        return {"prompt": given.prompt}
    pooled, states = torch.randn(1, 8), torch.randn(1, 5, 16)
    return {
        "prompt_embeds": pooled,
        "encoder_hidden_states": states,
        "negative_prompt_embeds": torch.zeros_like(pooled),
        "negative_encoder_hidden_states": torch.zeros_like(states),
    }


@torch.no_grad()
def main() -> None:
    """Generate one image and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="of the hub or a folder; by default a tiny random one")
    parser.add_argument("--prompt", default="a cowboy")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="amused.png")
    given = parser.parse_args()

    load = diffusers.AmusedPipeline.from_pretrained
    pipe = tiny() if given.model is None else load(given.model)
    with maskgit.adapters.fast_sampler(pipe) as handle:
        image = pipe(
            **prompt_of(given),
            num_inference_steps=given.steps,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    image.save(given.out)
    print(given.out)
    print(
        f"{handle.report.adapter}: {handle.report.calls} calls of {', '.join(handle.report.replaced)}"
    )


if __name__ == "__main__":
    main()
