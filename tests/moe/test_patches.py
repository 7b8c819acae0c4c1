"""Patches: equal experts compute what the dense module does, whatever the size, grid and stride."""

import pytest
import torch
from moe_testlib import item_by_item, moe_of, plan_router, scatter_experts, topk_router
from torch import nn

from mmdet_moe.moe import upcycle_
from mmdet_moe.moe.experts import geometry
from mmdet_moe.moe.patches import Patches, spans


def maps(height, width, batch=2, channels=3, seed=0):
    return torch.randn(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed)
    )


def patch_layer(module, grid, **spec):
    spec.setdefault('router', topk_router(k=2, noise=False))
    if spec['router']['type'] != 'PlanRouter':
        spec.setdefault('num_experts', 3)
    return moe_of(module, granularity='patch', grid=grid, **spec)


def test_spans_by_hand():
    # Outputs 0-3 and 4-8, which depend on inputs -1..4 (six) and 3..9 (seven): windows of seven,
    # moved inside to 0..6 and 2..8.
    assert spans(9, grid=2, halo=1) == ([(0, 0, 4), (2, 4, 9)], 7)
    # Stride 2: outputs 0-1 and 2-3 sit at inputs 0, 2 and 4, 6 and depend on -1..3 and 3..7; from
    # even places on that is -2..3 and 2..7: windows of six at 0 and 2.
    assert spans(8, grid=2, halo=1, stride=2) == ([(0, 0, 2), (2, 2, 4)], 6)
    with pytest.raises(ValueError, match='grid=3 cannot cut 2 places'):
        spans(3, grid=3, stride=2)


@pytest.mark.parametrize('size', [(8, 8), (9, 7), (5, 13)])
@pytest.mark.parametrize('grid', [1, 2, 3])
@pytest.mark.parametrize('halo', [0, 2])
def test_cutting_and_joining_gives_the_map_back(size, grid, halo):
    x = maps(*size)
    patches = Patches(grid, halo)
    cut = patches.cut(x)
    assert cut.shape[0] == 2 * grid**2
    assert torch.equal(patches.join(cut, x), x)


def test_patches_are_image_major_and_by_row():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(2, 1, 1, 1)
    x[1] += 100
    bare = Patches(2).cut_bare(x)
    assert bare[:, 0, 0, 0].tolist() == [0, 2, 8, 10, 100, 102, 108, 110]


CONVOLUTIONS = {
    '3x3': nn.Conv2d(3, 4, 3, padding=1),
    '1x1': nn.Conv2d(3, 4, 1),
    'dilated': nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    'strided': nn.Conv2d(3, 4, 3, stride=2, padding=1),
    '7x7/2': nn.Conv2d(3, 4, 7, stride=2, padding=3),
    'grouped': nn.Conv2d(3, 6, 5, padding=2, groups=3),
}


@pytest.mark.parametrize('size', [(8, 8), (9, 11)])
@pytest.mark.parametrize('grid', [2, 3])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_equal_experts_are_the_dense_convolution(name, grid, size):
    dense, x = CONVOLUTIONS[name], maps(*size)
    layer, state = patch_layer(dense, grid)
    state.begin(num_images=2, training=True)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    # Of 2 images, each patch to 2 experts.
    assert state.stats()['target/count'].sum() == 2 * grid**2 * 2


@pytest.mark.parametrize('size', [(12, 12), (13, 15)])
def test_a_stage_of_strided_convolutions_too(size):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 5, 3, padding=1),
    )
    nn.init.normal_(dense[1].bias)  # what is padded is not what the norm makes of zeros
    dense.eval()
    assert geometry(dense, 3, '').stride == 4
    assert geometry(dense, 3, '').reach == 1 + 2 + 4
    layer, state = patch_layer(dense, 2)
    layer.eval()
    state.begin(num_images=2)
    torch.testing.assert_close(layer(maps(*size)), dense(maps(*size)), rtol=1e-5, atol=1e-5)


def test_without_a_halo_only_the_seams_differ():
    dense, x = CONVOLUTIONS['3x3'], maps(8, 8)
    layer, state = patch_layer(dense, 2, halo=0)
    state.begin(num_images=2)
    wrong = (layer(x) - dense(x)).abs().amax((0, 1)) > 1e-5
    seam = torch.zeros(8, 8, dtype=torch.bool)
    seam[3:5] = seam[:, 3:5] = True
    assert torch.equal(wrong, seam)


def test_each_patch_goes_to_its_own_experts():
    torch.manual_seed(0)
    layer, state = patch_layer(nn.Conv2d(3, 4, 1), 2, router=topk_router(k=1, noise=False))
    scatter_experts(layer)
    with torch.no_grad():
        layer.router.gate.copy_(100 * torch.eye(3))
    x = maps(6, 6, batch=2)
    bare = Patches(2).cut_bare(x)
    choice = bare.mean((2, 3)).argmax(1)
    weights = nn.functional.one_hot(choice, 3).double() * (
        (100 * bare.mean((2, 3))).softmax(1).amax(1, keepdim=True)
    )
    state.begin(num_images=2)
    expected = Patches(2).join(item_by_item(layer, bare, weights.tolist()), x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert len(set(choice.tolist())) > 1


def test_plans_and_domain_supervision_know_the_image_of_each_patch():
    layer, state = patch_layer(nn.Conv2d(3, 4, 3, padding=1), 3, router=plan_router())
    scatter_experts(layer)
    x = maps(8, 8)
    state.begin(domains=['a', 'c'])
    out = layer(x)
    for i, expert in enumerate((0, 2)):
        torch.testing.assert_close(out[i : i + 1], layer.experts[expert](x[i : i + 1]))
    assert state.stats()['target/count'].tolist() == [9, 0, 9]

    inner = topk_router(k=1, noise=False)
    router = dict(type='DAMEXRouter', plan={'a': 'e0', 'b': 'e1'}, router=inner, weight=1.0)
    layer, state = patch_layer(nn.Conv2d(3, 4, 1), 2, router=router, num_experts=2)
    nn.init.zeros_(layer.router.inner.gate)
    state.begin(domains=['a', 'b'], training=True)
    layer(x)
    # Eight patches at even odds: ln 2.
    assert state.collect()['loss_moe_damex'].item() == pytest.approx(0.693147, abs=1e-5)


def test_conv_gates_bypasses_losses_and_gradients_work_on_patches():
    torch.manual_seed(0)
    layer, state = patch_layer(
        nn.Conv2d(3, 3, 3, padding=1),
        2,
        router=topk_router(k=2, kind='conv', projection=4),
        balance=[dict(type='KLLoss'), dict(type='RelativeImportanceConstraint')],
        bypass=True,
    )
    upcycle_(nn.ModuleDict({'target': layer}))
    x = maps(7, 7).requires_grad_()
    state.begin(num_images=2, training=True)
    out = layer(x)
    torch.testing.assert_close(out, x + layer.experts[0](x), rtol=1e-5, atol=1e-5)
    (out.square().mean() + sum(state.collect().values())).backward()
    assert layer.router.convs[0].weight.grad.isfinite().all()
    assert all(p.grad is not None for p in layer.router.parameters())


@pytest.mark.parametrize(
    'module, spec, message',
    [
        (nn.Conv2d(3, 4, 3, padding=1), dict(grid=None), 'needs grid=g, 1 or more, got None'),
        (nn.Conv2d(3, 4, 3, padding=1), dict(grid=2, halo=-1), 'halo must be a number >= 0'),
        (nn.Conv2d(3, 4, 3), dict(grid=2), 'makes 62 of 64 places and 59 of 61'),
        (nn.Linear(3, 4), dict(grid=2), "granularity 'patch' does not suit a Linear"),
        (
            nn.Sequential(nn.Linear(3, 4)),
            dict(grid=2),
            r'Sequential, does not take maps \(B, C, H, W\) to maps',
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(module, spec, message):
    with pytest.raises(ValueError, match=message):
        patch_layer(module, **spec)


def test_grid_is_for_patches():
    with pytest.raises(ValueError, match="grid and halo are for granularity='patch'"):
        moe_of(nn.Conv2d(3, 4, 1), num_experts=2, router=topk_router(k=1), grid=2)
