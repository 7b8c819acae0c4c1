"""The same weights in the packages people use: outputs, auxiliary losses and gradients to 1e-5."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.moe import MoELayer, RoutingState

D, E, HIDDEN = 16, 4, 24
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def ours(experts, router, balance=()):
    """A MoE layer of the peer's own expert modules."""
    layer = MoELayer(
        experts, router, RoutingState(), granularity='token', in_channels=D, balance=balance
    )
    return layer.train()


def run(layer, x):
    layer.state.begin(num_images=len(x), training=True)
    out = layer(x)
    return out, sum(layer.state.collect().values())


def compare(layer, x, pairs, peer_run, with_loss=True, prepare=lambda x: x):
    """Outputs, losses, and the gradients of the input and of (theirs, ours, map) pairs."""
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    out, loss = peer_run(one)
    out2, loss2 = run(layer, prepare(two))
    torch.testing.assert_close(out2, out, **TOLERANCE)
    if with_loss:
        torch.testing.assert_close(torch.as_tensor(loss2), loss, **TOLERANCE)
        ((out * probe).sum() + loss.sum()).backward()
        ((out2 * probe).sum() + loss2).backward()
    else:
        (out * probe).sum().backward()
        (out2 * probe).sum().backward()
    torch.testing.assert_close(two.grad, one.grad, **TOLERANCE)
    for theirs, mine, change in pairs:
        torch.testing.assert_close(change(mine), change.theirs(theirs), **TOLERANCE)


class Same:
    """Compares gradients of parameters of the same layout (or ours transposed)."""

    def __init__(self, transpose=False):
        self.transpose = transpose

    def __call__(self, mine):
        return mine.grad.t() if self.transpose else mine.grad

    def theirs(self, parameter):
        return parameter.grad


# mixture-of-experts 0.2.3


def bias_free_experts(peer):
    """Our experts with the weights of the peer's (E, d, h) and (E, h, d) tensors."""
    experts = []
    for w1, w2 in zip(peer.experts.w1, peer.experts.w2, strict=True):
        net = nn.Sequential(
            nn.Linear(D, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, D, bias=False)
        )
        with torch.no_grad():
            net[0].weight.copy_(w1.t())
            net[2].weight.copy_(w2.t())
        experts.append(net)
    return experts


def top2_pair(factor, policy='all', **router):
    module = pytest.importorskip('mixture_of_experts')
    torch.manual_seed(0)
    peer = module.MoE(
        D,
        num_experts=E,
        hidden_dim=HIDDEN,
        second_policy_train=policy,
        capacity_factor_train=factor,
        loss_coef=1.0,
    ).train()
    layer = ours(
        bias_free_experts(peer),
        dict(type='GShardRouter', **router),
        [dict(type='SwitchLoss', weight=1.0)],
    )
    with torch.no_grad():
        layer.router.gate.copy_(peer.gate.w_gating.t())
    return peer, layer


def check_top2(peer, layer, x, with_loss):
    class PerExpert(Same):
        def theirs(self, expert):
            e, name = expert
            return getattr(peer.experts, name).grad[e].t()

    pairs = [(peer.gate.w_gating, layer.router.gate, Same(transpose=True))]
    for e, expert in enumerate(layer.experts):
        pairs.append(((e, 'w1'), expert[0].weight, PerExpert()))
        pairs.append(((e, 'w2'), expert[2].weight, PerExpert()))
    compare(layer, x, pairs, peer, with_loss)


def test_mixture_of_experts_dropless():
    """Theirs: second_policy 'all', a capacity that holds everything (factor E). Ours: GShardRouter
    with second='all'. Their loss is the mean over the sequences of the batch, ours is over the
    batch: with more than one sequence they are different on purpose, and only outputs are
    compared."""
    peer, layer = top2_pair(float(E), second='all')
    check_top2(peer, layer, torch.randn(3, 16, D), with_loss=False)


def test_mixture_of_experts_with_drops_and_loss():
    """Theirs: factor 1, 16 · 1 / 4 = 4 items per expert of one sequence, k not counted, rounded
    down, at least 4. Ours counts k and rounds up: factor 0.5 is ceil(0.5 · 16 · 2 / 4) = 4."""
    peer, layer = top2_pair(1.0, second='all', capacity_factor=0.5)
    x = torch.randn(1, 16, D)
    check_top2(peer, layer, x, with_loss=True)
    assert sum(layer.state.stats()['moe/count'].tolist()) < 32  # something was dropped


def test_mixture_of_experts_random_second(monkeypatch):
    """With the same uniform draws. On purpose: they draw in evaluation too, by default; we do so
    in training only."""
    peer, layer = top2_pair(float(E), 'random')
    x = torch.randn(1, 16, D)
    draws = torch.rand(16, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, 'rand_like', lambda w: torch.stack([draws, draws], 1))
    real = torch.Tensor.uniform_

    def uniform(tensor, *args):
        return tensor.copy_(draws) if tensor.shape == (1, 16) else real(tensor, *args)

    monkeypatch.setattr(torch.Tensor, 'uniform_', uniform)
    check_top2(peer, layer, x, with_loss=True)
    assert 16 < sum(layer.state.stats()['moe/count'].tolist()) < 32


# st-moe-pytorch 0.1.8


@pytest.mark.parametrize('k, factor, our_factor', [(2, 4.0, None), (2, 1.0, 0.5), (3, 1.5, 0.5)])
def test_st_moe(k, factor, our_factor):
    """Theirs: threshold 0 (every choice is kept), straight_through_dispatch_tensor=False (True adds
    a gradient that is not that of the function: it flows to the gate as if the dispatch weights
    were the combine weights), one sequence. Ours: second='all'; capacities 16 · 1 / 4 = 4 and
    16 · 1.5 / 4 = 6 are 0.5 · 16 · k / 4 of ours.

    Where items are dropped the balance loss is not compared: theirs counts the first choices that
    were kept (an in-place change of the mask that it looks at later), GShard and ours all of them.
    """
    module = pytest.importorskip('st_moe_pytorch')
    torch.manual_seed(1)
    peer = module.MoE(
        D,
        num_experts=E,
        gating_top_n=k,
        threshold_train=0.0,
        capacity_factor_train=factor,
        straight_through_dispatch_tensor=False,
        balance_loss_coef=1.0,
        router_z_loss_coef=1.0,
    ).train()
    dropless = our_factor is None
    layer = ours(
        [copy.deepcopy(expert) for expert in peer.experts.experts],
        dict(type='GShardRouter', k=k, second='all', capacity_factor=our_factor, z_loss=1.0),
        [dict(type='SwitchLoss', weight=1.0)] if dropless else [],
    )
    with torch.no_grad():
        layer.router.gate.copy_(peer.gate.to_gates.weight)
    pairs = [(peer.gate.to_gates.weight, layer.router.gate, Same())]
    pairs += expert_pairs(peer, layer)

    def peer_run(x):
        out, total, _, z = peer(x)
        return out, total if dropless else z

    compare(layer, torch.randn(1, 16, D), pairs, peer_run)
    assert (sum(layer.state.stats()['moe/count'].tolist()) == 16 * k) == dropless


def expert_pairs(peer, layer):
    return [
        (p, q, Same())
        for theirs, mine in zip(peer.experts.experts, layer.experts, strict=True)
        for p, q in zip(theirs.parameters(), mine.parameters(), strict=True)
    ]


# soft-moe-pytorch 0.1.9


def test_soft_moe():
    """Theirs normalises tokens and slots by root mean square (times a learned gamma, 1 at first)
    and mixes the *normalised* tokens: logits are sqrt(d)·sqrt(d)·cos = d·cos. Ours, as the paper,
    mixes the tokens as they are: it gets theirs normalised, and a scale of d. Their gammas and our
    scale are different parameters and are not compared. Different on purpose: theirs
    grows with d, where the paper's scale starts at 1; ours is held at 40 at most, so that one pass
    of exponentials serves both softmaxes, and could not be made theirs above d = 40."""
    module = pytest.importorskip('soft_moe_pytorch')
    torch.manual_seed(2)
    peer = module.SoftMoE(D, num_slots=3, num_experts=E, expert_mult=2).train()
    layer = ours(
        [copy.deepcopy(expert) for expert in peer.experts.experts],
        dict(type='SoftMoERouter', slots=3, scale=float(D)),
    )
    with torch.no_grad():
        layer.router.slot_embeddings.copy_(peer.slot_embeds.flatten(0, 1))

    class Slots(Same):
        def theirs(self, parameter):
            return parameter.grad.flatten(0, 1)

    pairs = [(peer.slot_embeds, layer.router.slot_embeddings, Slots())]
    pairs += expert_pairs(peer, layer)
    norm = copy.deepcopy(peer.norm)
    x = torch.randn(3, 10, D)
    compare(layer, x, pairs, lambda x: (peer(x), None), with_loss=False, prepare=norm)
