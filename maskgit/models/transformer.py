"""The bidirectional transformer of MaskGIT.

A post-LayerNorm BERT, as in google-research/maskgit (`maskgit/nets/maskgit_transformer.py`), with
two savings that change no result: query, key and value come from one packed product, and the head
multiplies only by the codebook's rows of the tied embedding (the official code multiplies by all
2025 rows and cuts the logits to 1024 afterwards) and only at image positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.kernels.attention import attention
from maskgit.kernels.residual_norm import residual_norm
from maskgit.models.config import TransformerConfig

INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, without a mask, followed by residual and LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        if (
            x.is_cuda and not torch.is_grad_enabled()
        ):  # read in place, and dispatched to the fastest
            y = attention(*qkv.unbind(2))
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            dropout = self.attention_dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2)
        y = self.out(y.reshape(batch, length, width))
        return _added(self.norm, x, self.dropout(y))


class Mlp(nn.Module):
    """Two-layer MLP with tanh-form GELU, followed by residual and LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size)
        self.down = nn.Linear(config.mlp_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        y = self.down(F.gelu(self.up(x), approximate="tanh"))
        return _added(self.norm, x, self.dropout(y))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.mlp(self.attention(x))


class Embedding(nn.Module):
    """Word plus position embeddings, LayerNorm, dropout."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.num_tokens + 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 -> (B, L, D)."""
        return self.dropout(self.norm(self.word(ids) + self.position.weight[: ids.shape[1]]))


class Head(nn.Module):
    """Dense, GELU, LayerNorm, then the product with the embedding of the codes, and a bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def project(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): what is multiplied by the embedding."""
        return self.norm(F.gelu(self.dense(x), approximate="tanh"))


class MaskGitTransformer(nn.Module):
    """Predicts a distribution over the codebook at each image position, given class and tokens.

    The class is the first token of the sequence (id `codebook_size + class`), so the sequence is
    one longer than the image's tokens; logits are given for the image's positions alone.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.apply(_initialise)

    def hidden(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Last hidden states (B, N, D) at the image positions.

        tokens is (B, N) int64 with the mask id where unknown; class_ids is (B,) int64, where
        `num_classes` stands for "no class" in a model that has it.
        """
        first = (self.config.codebook_size + class_ids).unsqueeze(1)
        x = self.embedding(torch.cat([first, tokens], dim=1))
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., codebook_size) of hidden states (..., D)."""
        weight, bias = self.head_weight()
        return F.linear(self.head.project(hidden), weight, bias)

    def head_weight(self) -> tuple[Tensor, Tensor]:
        """The head's matrix (codebook_size, D) and bias (codebook_size,): views, not copies."""
        size = self.config.codebook_size
        return self.embedding.word.weight[:size], self.head.bias[:size]

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        """Logits (B, N, codebook_size); see `hidden` for the arguments."""
        self.check_inputs(tokens, class_ids)
        return self.logits(self.hidden(tokens, class_ids))

    def check_inputs(self, tokens: Tensor, class_ids: Tensor) -> None:
        """Raise ValueError when the shapes do not fit the model (values are not read)."""
        count = self.config.num_tokens
        if tokens.ndim != 2 or tokens.shape[1] != count:
            raise ValueError(f"tokens: expected shape (B, {count}), got {tuple(tokens.shape)}")
        if tuple(class_ids.shape) != (tokens.shape[0],):
            raise ValueError(
                f"class_ids: expected shape ({tokens.shape[0]},), got {tuple(class_ids.shape)}"
            )


def _added(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """norm(x + y), on a GPU without gradients in one kernel."""
    if x.is_cuda and not torch.is_grad_enabled():
        return residual_norm(x, y, norm.weight, norm.bias, norm.eps)
    out: Tensor = norm(x + y)
    return out


def _initialise(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for every matrix, zero for every bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
