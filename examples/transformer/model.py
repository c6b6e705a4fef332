"""A keyword transformer (Berg et al. 2021, arXiv:2104.00769): every frame of a log-mel spectrogram is a token."""

import torch
import torch.nn.functional as F
from features import BANDS, FRAMES
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762), [batch, tokens, width] to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    """An encoder layer with its norms in front (arXiv:2002.04745), which trains without a warm-up."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class KeywordTransformer(nn.Module):
    """Float spectrograms [batch, 49, 40] to scores [batch, 10]. 542,986 parameters, 28.4 million multiply-adds."""

    def __init__(
        self,
        words: int = 10,
        width: int = 128,
        heads: int = 4,
        hidden: int = 256,
        layers: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.embed = nn.Linear(BANDS, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, FRAMES, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.embed(x) + self.position)
        scores: Tensor = self.head(self.norm(tokens).mean(1))
        return scores
