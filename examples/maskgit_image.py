"""Images by class from the MaskGIT that ships with the package.

    python examples/maskgit_image.py --classes 3 5 7 --out digits.png

Needs the extra `model`.
"""

import argparse

import torch

from maskgit.pipelines.images import load
from maskgit.report import pictures


def main() -> None:
    """Draw some digits, then the right half of the first one anew, and write all as one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="digits.png")
    given = parser.parse_args()

    pipeline = load("digits")
    result = pipeline.generate_tokens(given.classes, num_steps=given.steps, seeds=given.seed)
    images = pipeline.decode(result.tokens)  # (B, 1, 8, 8) in [0, 1]

    # known tokens stay: what is set to the mask id is drawn anew
    tokens = result.tokens[:1].repeat(len(given.classes), 1)
    half = torch.arange(64).reshape(8, 8)[:, 4:].flatten()
    tokens[:, half] = pipeline.mask_token_id
    filled = pipeline.fill(tokens, given.classes[:1] * len(tokens), seeds=given.seed + 1)

    rows = [list(images[:, 0].numpy()), list(pipeline.decode(filled.tokens)[:, 0].numpy())]
    print(pictures.save_png(pictures.grid(rows, row_labels=["drawn", "redrawn"]), given.out))


if __name__ == "__main__":
    main()
