"""Text from a masked language model of Hugging Face's transformers, decoded as LLaDA decodes.

    python examples/llada_like.py                                  # a tiny random one, made on the spot
    python examples/llada_like.py --model bert-base-uncased        # one from the hub

Needs transformers (the extra `diffusers` brings it).  For LLaDA's own code see the adapter `llada`.
"""

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

import maskgit

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "and",
    "then",
    "happy",
    ".",
)


def tiny() -> tuple[Any, Any]:
    """A tokenizer of a few words and a random model over them."""
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return tokenizer, BertForMaskedLM(config)


def main() -> None:
    """Complete a prompt, block by block, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="of the hub or a folder; by default a tiny random one")
    parser.add_argument("--prompt", default="the cat sat on")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.5)
    given = parser.parse_args()

    if given.model is None:
        tokenizer, model = tiny()
    else:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForMaskedLM.from_pretrained(given.model)
    model.eval()
    prompt = tokenizer(given.prompt, add_special_tokens=False, return_tensors="pt").input_ids
    masks = torch.full((1, given.new_tokens), tokenizer.mask_token_id)
    result = maskgit.generate(
        lambda tokens: model(tokens).logits,
        torch.cat([prompt, masks], dim=1),
        rule="llada-fixed",  # LLaDA's, but the mask token is never drawn
        mask_token_id=tokenizer.mask_token_id,
        num_steps=given.steps,
        block_length=given.block_length,
        prompt_length=prompt.shape[1],
        temperature=given.temperature,
        seeds=torch.tensor([0]),
    )
    print(tokenizer.decode(result.tokens[0]))


if __name__ == "__main__":
    main()
