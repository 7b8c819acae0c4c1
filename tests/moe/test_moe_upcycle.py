"""Upcycled models compute what the dense one did, and dense checkpoints load into every expert."""

import copy

import pytest
import torch
from moe_testlib import MIXED, ONE_EACH, ToyFFN, plan_router, topk_router
from torch import nn

from mmdet_moe.moe import RoutingState, replace_modules, upcycle_, upcycle_from_checkpoints


class Net(nn.Module):
    """Every kind of target behind one another, on maps and then on tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.gn = nn.GroupNorm(2, 6)
        self.stage = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.BatchNorm2d(6))
        self.ffn = ToyFFN()
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stage(self.gn(self.bn(self.conv(x))))
        return self.out(self.norm(self.ffn(x.flatten(2).transpose(1, 2))))


TARGETS = r'conv|bn|gn|stage|ffn|norm|out'


def trained_dense(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    for _ in range(3):  # running statistics that are not the default
        net(torch.randn(4, 4, 5, 5, dtype=dtype) * 2 + 1)
    return net


def moe(dense, **spec):
    model, state = copy.deepcopy(dense), RoutingState()
    spec.setdefault('router', plan_router(MIXED))
    replace_modules(model, [dict(targets=TARGETS, **spec)], state)
    return model, state


def assert_same_function(model, state, dense, dtype):
    model.eval(), dense.eval()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    x = torch.randn(5, 4, 5, 5, dtype=dtype)
    for domains in (['a', 'mixed', 'b', 'mixed', 'a'], ['b'] * 5):
        state.begin(domains)
        assert (model(x) - dense(x)).abs().max() <= tolerance


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    'spec', [{}, dict(router=topk_router(k=2), num_experts=3)], ids=['plan', 'topk']
)
def test_replacement_keeps_the_dense_function(dtype, spec):
    dense = trained_dense(dtype=dtype)
    model, state = moe(dense, **spec)
    model.to(dtype)
    assert all(m.keeps_dense_function for m in model.children())
    assert_same_function(model, state, dense, dtype)


def test_upcycle_puts_right_what_init_weights_scrambled():
    model, state = moe(Net(), router=topk_router(k=2), num_experts=3)
    for p in model.parameters():  # as DINO's init_weights: everything, routers too
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    dense = Net()
    dense.load_state_dict(
        {k.replace('experts.0.', ''): v for k, v in model.state_dict().items() if '.0.' in k
         and 'experts.0.' in k}
    )  # fmt: skip
    assert upcycle_(model) == TARGETS.split('|')
    assert_same_function(model, state, dense, torch.float32)
    assert model.conv.router.gate.std() < 0.03, 'the router starts small again'
    assert model.conv.router.noise_gate.eq(0).all()


def test_upcycle_is_the_same_on_every_rank_and_leaves_the_random_state():
    model, _ = moe(Net(), router=topk_router(k=1), num_experts=3, noise=0.1)
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    upcycle_(model)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    upcycle_(other)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    upcycle_(other, seed=1)
    assert not torch.equal(model.conv.experts[1].weight, other.conv.experts[1].weight)


def test_noise_is_relative_to_each_parameter_and_breaks_the_symmetry():
    torch.manual_seed(0)
    model, state = RoutingStateless(nn.Linear(200, 200)), RoutingState()
    with torch.no_grad():
        model.inner.bias.zero_()
    dense = copy.deepcopy(model.inner.weight.detach())
    replace_modules(model, [dict(targets='inner', router=plan_router(), noise=0.1)], state)
    assert not model.inner.keeps_dense_function
    upcycle_(model)
    weights = [expert.weight.detach() for expert in model.inner.experts]
    for weight in weights:
        assert ((weight - dense).std() / dense.std()).item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(weights[0], weights[1])
    assert model.inner.experts[1].bias.eq(0).all(), 'a constant tensor has no scale'
    upcycle_(model, noise=0.0)
    assert torch.equal(model.inner.experts[0].weight, model.inner.experts[1].weight)


class RoutingStateless(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


# Dense checkpoints


def load_torch(model, state_dict):
    model.load_state_dict(state_dict, strict=True)


def load_mmengine(model, state_dict):
    checkpoint = pytest.importorskip('mmengine.runner.checkpoint')
    checkpoint.load_state_dict(model, state_dict, strict=True)


@pytest.mark.parametrize('load', [load_torch, load_mmengine])
@pytest.mark.parametrize(
    'spec', [{}, dict(router=topk_router(k=2), num_experts=3)], ids=['plan', 'topk']
)
def test_a_dense_checkpoint_loads_into_every_expert(load, spec):
    model, state = moe(Net(), **spec)
    dense = trained_dense(seed=5)
    checkpoint = dense.state_dict()
    keys = list(checkpoint)
    load(model, checkpoint)
    assert list(checkpoint) == keys, 'the checkpoint itself is left alone'
    assert_same_function(model, state, dense, torch.float32)
    assert all(bn.num_batches_tracked == 3 for bn in model.bn.experts)


@pytest.mark.parametrize('load', [load_torch, load_mmengine])
def test_a_moe_checkpoint_round_trips(load):
    model, state = moe(Net(), router=topk_router(k=2), num_experts=3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    other, _ = moe(Net(), router=topk_router(k=2), num_experts=3)
    load(other, model.state_dict())
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_dense_checkpoint_is_disturbed_where_noise_is_asked_for():
    model, _ = moe(Net(), noise=0.05)
    model.load_state_dict(trained_dense(seed=5).state_dict())
    experts = model.conv.experts
    assert not torch.equal(experts[0].weight, experts[1].weight)
    assert torch.equal(model.bn.experts[0].running_mean, model.bn.experts[1].running_mean)


def test_a_dense_checkpoint_of_another_shape_is_an_error_even_where_the_loader_only_warns():
    model, _ = moe(Net())
    checkpoint = trained_dense().state_dict()
    checkpoint['out.weight'] = torch.zeros(7, 6)
    for load in (load_torch, load_mmengine):
        with pytest.raises(ValueError, match=r'out.weight: .* shape \(7, 6\), the experts \(5, 6'):
            load(model, checkpoint)


def test_another_number_of_experts_is_an_error():
    model, _ = moe(Net())
    four, _ = moe(Net(), router=plan_router(dict(ONE_EACH, d='e3')))
    with pytest.raises(ValueError, match=r"has experts \['0', '1', '2', '3'\] at 'conv', the mod"):
        model.load_state_dict(four.state_dict())
    # Fewer too: the experts left over would silently keep their initialisation.
    for load in (load_torch, load_mmengine):
        with pytest.raises(
            ValueError, match=r"has experts \['0', '1', '2'\] at 'conv', the model 4"
        ):
            load(four, model.state_dict())


def test_missing_keys_are_still_reported():
    model, _ = moe(Net())
    checkpoint = trained_dense().state_dict()
    del checkpoint['out.bias']
    with pytest.raises(RuntimeError, match='Missing key.*out.experts.0.bias'):
        model.load_state_dict(checkpoint)


# One checkpoint per dataset


def test_per_dataset_checkpoints_go_to_the_experts_that_serve_them(tmp_path):
    model, state = moe(Net())
    nets = {name: trained_dense(seed) for seed, name in enumerate(['b', 'mixed'])}
    torch.save({'state_dict': nets['b'].state_dict()}, tmp_path / 'b.pth')
    untouched = trained_dense(9)
    model.load_state_dict(untouched.state_dict())
    # a -> e0, b -> e1, mixed -> e0 and e2: only b and e2 are given.
    report = upcycle_from_checkpoints(
        model, {'b': tmp_path / 'b.pth', 'e2': nets['mixed'].state_dict()}
    )
    assert report['conv'] == {'1': ['b'], '2': ['e2']}
    x = torch.randn(3, 4, 5, 5)
    model.eval(), untouched.eval(), nets['b'].eval()
    for domain, net in [('a', untouched), ('b', nets['b'])]:
        state.begin([domain] * 3)
        torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(
        dict(model.out.experts[2].state_dict()), dict(nets['mixed'].out.state_dict())
    )


def test_experts_by_number_need_no_plan():
    model, _ = moe(Net(), router=topk_router(k=1), num_experts=2)
    net = trained_dense(1)
    upcycle_from_checkpoints(model, {1: net.state_dict()})
    torch.testing.assert_close(model.conv.experts[1].weight, net.conv.weight)


def test_two_checkpoints_for_one_expert_are_refused_unless_averaged():
    model, _ = moe(Net())
    nets = {name: trained_dense(seed).state_dict() for seed, name in enumerate(['a', 'mixed'])}
    with pytest.raises(ValueError, match=r"conv: the checkpoints \['a', 'mixed'\] all reach"):
        upcycle_from_checkpoints(model, nets)
    upcycle_from_checkpoints(model, nets, average=True)
    mean = (nets['a']['conv.weight'] + nets['mixed']['conv.weight']) / 2
    torch.testing.assert_close(model.conv.experts[0].weight.detach(), mean)
    torch.testing.assert_close(model.conv.experts[2].weight.detach(), nets['mixed']['conv.weight'])


def test_bad_checkpoints_are_named_and_nothing_is_written(tmp_path):
    model, _ = moe(Net())
    before = copy.deepcopy(model.state_dict())
    good = trained_dense(1).state_dict()
    wrong = dict(good, **{'out.bias': torch.zeros(9)})
    part = {k: v for k, v in good.items() if k != 'norm.weight'}
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    for checkpoints, message in [
        ({'b': good, 'x': good}, "'x' is neither an expert nor a dataset of the plan"),
        ({7: good}, 'has no expert 7'),
        ({'b': wrong}, r'out.bias has shape \(9,\), the expert \(5,\)'),
        ({'b': part}, 'has no norm.weight'),
        ({'b': model.state_dict()}, 'is a MoE model at conv'),
        ({'b': tmp_path / 'none.pth'}, 'no checkpoint at'),
        ({'b': tmp_path / 'junk.pth'}, 'cannot be read as plain tensors'),
    ]:
        with pytest.raises((KeyError, ValueError, FileNotFoundError), match=message):
            upcycle_from_checkpoints(model, checkpoints)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match='no MoE layers'):
        upcycle_from_checkpoints(Net(), {0: good})
