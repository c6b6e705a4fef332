"""Attention as people write it becomes one layer that computes the same, and whose heads can be counted."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgebuild.analyse import analyse, check_prunable
from edgebuild.attempt import artifact_file
from edgebuild.attention import Attention
from edgebuild.backends import xnnpack
from edgebuild.devices import DEVICES
from edgebuild.lift import batch_is_free, lift
from edgebuild.sensitivity import measure, moments
from edgebuild.spec import Target, Width
from edgebuild.transforms import prune
from edgebuild.verify import to_arrays

TOKENS, WIDTH, HEADS = 6, 24, 3


class Separate(nn.Module):
    """Layers of their own, scaled_dot_product_attention, a position and the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        batch, tokens, width = x.shape
        q, k, v = (m(x).view(batch, tokens, HEADS, -1).transpose(1, 2) for m in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width)).mean(1)


class Fused(nn.Module):
    """One layer for all three, products and a softmax, a scale in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        shares = self.dropout(((0.5 * q) @ k.transpose(-2, -1) / math.sqrt(2)).softmax(-1))
        return self.out((shares @ v).transpose(1, 2).reshape(batch, tokens, width))


class Library(nn.Module):
    """PyTorch's own layers, which keep the tokens first inside, and a class token."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1))[:, 0]


class Causal(Separate):
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (m(x).view(batch, tokens, HEADS, -1).transpose(1, 2) for m in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class TokensAsHeads(Separate):
    """The views mix tokens and heads up: no attention between tokens."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (m(x).view(batch, HEADS, tokens, -1) for m in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).reshape(batch, tokens, width))


SPELLINGS = {"separate": Separate, "fused": Fused, "library": Library, "norm first": lambda: Library(norm_first=True)}


def sample(batch: int = 1) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(batch))


def made(kind) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def attentions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


@pytest.mark.parametrize("kind", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_the_same_layer(kind):
    model = made(kind)
    lifted = lift(model, (sample(),))
    count = 2 if isinstance(model, Library) else 1
    assert len(attentions(lifted)) == count
    assert "scaled_dot_product" not in str(lifted.graph) and "softmax" not in str(lifted.graph)
    assert lifted.get_submodule(attentions(lifted)[0]).head_dim == WIDTH // HEADS
    assert batch_is_free(lifted, (sample(),))
    torch.testing.assert_close(lifted(sample(3)), model(sample(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SPELLINGS.values(), ids=SPELLINGS)
def test_lifting_again_changes_nothing(kind):
    once = lift(made(kind), (sample(),))
    again = lift(once, (sample(),))
    assert [str(n.target) for n in again.graph.nodes] == [str(n.target) for n in once.graph.nodes]
    assert attentions(again) == attentions(once)
    assert torch.equal(again(sample(3)), once(sample(3)))


@pytest.mark.parametrize("kind", [Causal, TokensAsHeads])
def test_what_is_no_plain_attention_stays_as_it_is(kind):
    model = made(kind)
    lifted = lift(model, (sample(),))
    assert not attentions(lifted)
    torch.testing.assert_close(lifted(sample()), model(sample()))


def halved(kind) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A lifted model, the same with two of three heads and half of every feed-forward width cut, and samples."""
    samples = [(x,) for x in torch.randn(24, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7)).split(1)]
    model = lift(made(kind), samples[0])
    facts = check_prunable(model, samples[0], analyse(model, samples[0]))
    found = measure(model, facts, samples[:8], {}, moments(model, facts, samples), False)
    chosen = [Width(group.name, max(1, group.channels // 2), group.channels) for group in facts.groups]
    assert [group.channels for group in facts.groups if group.each > 1] == [HEADS] * len(attentions(model))
    pruned = prune.apply(model, samples[0], facts, found, chosen)
    masked = copy.deepcopy(model)
    for name, weight in prune.repaired(model, facts, found, chosen).items():
        masked.get_submodule(name).weight.data = weight
    return masked, lift(pruned, samples[0]), samples


@pytest.mark.parametrize("kind", SPELLINGS.values(), ids=SPELLINGS)
def test_without_some_heads_it_computes_what_the_masked_model_does(kind):
    masked, pruned, samples = halved(kind)
    assert all(pruned.get_submodule(name).head_dim == WIDTH // HEADS for name in attentions(masked))
    for name in attentions(pruned):
        (call,) = [node for node in pruned.graph.nodes if node.target == name]
        assert pruned.get_submodule(str(call.args[0].target)).out_features == WIDTH // HEADS  # one head is left
    for sample_ in samples[:4]:
        torch.testing.assert_close(pruned(*sample_), masked(*sample_), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Separate, Library], ids=["separate", "library"])
def test_what_is_lowered_answers_as_eager_does(kind):
    _, pruned, samples = halved(kind)
    artifact = xnnpack.lower(pruned, samples[0])
    assert not [name for name in artifact.fallen_back if "norm" in name or "softmax" in name or "bmm" in name]
    host = Target(name="host", title="", device="host", status="measured")
    with artifact_file(artifact) as file, DEVICES["host"].load(file, host, 1) as session:
        (got,) = session.run(to_arrays(samples[3]))
    torch.testing.assert_close(torch.from_numpy(got), pruned(*samples[3]).detach(), rtol=1e-3, atol=1e-4)
