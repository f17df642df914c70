"""The loop by hand: one `decode_step` a step, with whatever you need in between.

    python examples/own_loop.py --rule llada --steps 6

Needs the extra `torch`.
"""

import argparse

import torch
from torch import nn

import maskgit

VOCAB, LENGTH = 50, 24
MASK = VOCAB  # the id after the last one that can be drawn


class Model(nn.Module):
    """Stands for yours: tokens (B, N) -> logits (B, N, VOCAB)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB + 1, 32)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits that depend on the tokens nearby."""
        x = self.embed(tokens)
        return self.head(torch.tanh(self.mix(x + x.roll(1, 1) + x.roll(-1, 1))))


@torch.no_grad()
def main() -> None:
    """Decode a batch of two, and print what is known after each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", default="llada", help="see `maskgit presets`")
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()

    torch.manual_seed(0)
    model = Model().eval()
    tokens = torch.full((2, LENGTH), MASK)
    tokens[:, :4] = torch.arange(4)  # a prompt: known tokens stay
    seeds = torch.tensor([11, 12])  # one per sequence
    at_start = (tokens == MASK).sum(1)  # the schedule counts from what was masked before step 0
    for step in range(given.steps):
        result = maskgit.decode_step(
            model(tokens),
            tokens,
            rule=given.rule,
            mask_token_id=MASK,
            step=step,
            num_steps=given.steps,
            num_masked_at_start=at_start,
            seeds=seeds,
        )
        # your own business goes here: look at result.confidence, stop early, change tokens ...
        tokens = result.next_tokens
        print(
            f"step {step}:", " ".join("--" if t == MASK else f"{t:2}" for t in tokens[0].tolist())
        )


if __name__ == "__main__":
    main()
