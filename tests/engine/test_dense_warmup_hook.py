"""One run that is dense first and MoE later, with nothing lost in between."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.engine import DenseWarmupHook
from mmdet_moe.moe import RoutingState, moe_layers, replace_modules, upcycle_

PLAN = dict(a='e0', b='e1')
STEPS = 8


class Regression(BaseModel):
    """y from x by two linear layers with a batch norm between; in the MoE twin all are layers."""

    def __init__(self, moe: bool):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))
        self.routing_state = RoutingState()
        if moe:
            router = dict(type='PlanRouter', plan=PLAN)
            replace_modules(self, [dict(targets=r'net\.[013]', router=router)], self.routing_state)
            upcycle_(self)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = torch.stack(list(inputs))
        domains = ['a' if x[0] > 0 else 'b' for x in inputs]
        self.routing_state.begin(domains, training=self.training)
        y = self.net(inputs).squeeze(1)
        self.routing_state.collect()
        return dict(loss=(y - inputs.sum(1)).square().mean()) if mode == 'loss' else y


class Losses(Hook):
    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append(outputs['loss'].item())


def runner_for(folder, moe=True, share=0.5, resume=False, optimizer='AdamW', ema=False):
    generator = torch.Generator().manual_seed(1)
    data = [dict(inputs=x, data_samples=0) for x in torch.randn(64, 3, generator=generator)]
    hooks = [dict(type=DenseWarmupHook, share=share)] if moe else []
    hooks += [dict(type='EMAHook', momentum=0.3)] if ema else []
    cfg = dict(
        model=Regression(moe),
        work_dir=str(folder),
        experiment_name=f'{folder.name}_{moe}_{resume}',
        train_dataloader=dict(
            batch_size=8, dataset=data, sampler=dict(type='InfiniteSampler', shuffle=False)
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=STEPS),
        optim_wrapper=dict(
            optimizer=dict(type=optimizer, lr=0.05, weight_decay=0.01), clip_grad=dict(max_norm=1.0)
        ),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1, max_keep_ckpts=-1)
        ),
        custom_hooks=hooks,
        resume=resume,
        default_scope='mmengine',
        log_level='WARNING',
    )
    runner = Runner(cfg=Config(), **cfg)
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    return runner, losses.values


def state_at(folder, step, key='state_dict'):
    return torch.load(folder / f'iter_{step}.pth', weights_only=False)[key]


def expert(state, e):
    """The dense model that expert e is, from a MoE model's state."""
    return {k.replace(f'.experts.{e}.', '.'): v for k, v in state.items() if f'.experts.{e}.' in k}


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize('ema', [False, True])
def test_until_the_experts_part_every_checkpoint_is_the_dense_twins_in_each_expert(tmp_path, ema):
    _, moe = runner_for(tmp_path / 'moe', ema=ema)
    _, dense = runner_for(tmp_path / 'dense', moe=False, ema=ema)
    # Step 5 is the first with a router: batch norms then see their own domain's images only.
    assert moe[:4] == dense[:4] and moe[4] != dense[4]
    for step in (1, 4):
        twin = state_at(tmp_path / 'dense', step)
        for e in (0, 1):
            assert_equal(expert(state_at(tmp_path / 'moe', step), e), twin)
    last = state_at(tmp_path / 'moe', 5)
    assert not torch.equal(last['net.0.experts.0.weight'], last['net.0.experts.1.weight'])
    assert all(value.isfinite().all() for value in last.values())


def test_both_experts_go_on_with_the_dense_momentum(tmp_path):
    runner_for(tmp_path / 'moe')
    runner_for(tmp_path / 'dense', moe=False)
    # Adam counts the steps of each parameter: a newborn state would have 4 of 8.
    saved = state_at(tmp_path / 'moe', 8, 'optimizer')['state']
    assert len(saved) == 2 * 6
    assert {int(value['step']) for value in saved.values()} == {8}
    # By hand, the first moment of e1's output bias after its first own step: it holds 0.9 of the
    # dense twin's, and 0.1 of a gradient g of its own; both have the same start, different g.
    after = state_at(tmp_path / 'moe', 5, 'optimizer')['state']
    names = [name for name, _ in Regression(True).named_parameters()]
    moments = [after[names.index(f'net.3.experts.{e}.bias')]['exp_avg'].item() for e in (0, 1)]
    start = state_at(tmp_path / 'dense', 4, 'optimizer')['state'][5]['exp_avg'].item()
    dense = state_at(tmp_path / 'dense', 5, 'optimizer')['state'][5]['exp_avg'].item()
    own = [moment - 0.9 * start for moment in moments]
    assert own[0] != own[1]
    # The domains' gradients add up to the batch's (0.1 g each; clipping scales all alike).
    scale = sum(own) / (dense - 0.9 * start)
    assert 0.5 < scale < 2


@pytest.mark.parametrize('killed', [2, 4, 6])
def test_a_run_resumed_before_at_and_after_the_parting_ends_with_the_same_bits(tmp_path, killed):
    _, losses = runner_for(tmp_path / 'whole')
    folder = tmp_path / 'whole'
    expected = state_at(folder, STEPS)
    for step in range(killed + 1, STEPS + 1):
        (folder / f'iter_{step}.pth').unlink()
    (folder / 'last_checkpoint').write_text(str(folder / f'iter_{killed}.pth'))
    _, resumed = runner_for(folder, resume=True)
    assert resumed == losses[killed:]
    assert_equal(state_at(folder, STEPS), expected)


def test_noise_waits_for_the_parting():
    model = Regression(True)
    for layer in moe_layers(model).values():
        layer.noise = 0.1
    runner = SimpleNamespace(
        model=model, max_iters=10, iter=0, optim_wrapper=None, logger=SimpleNamespace(info=print)
    )
    runner.optim_wrapper = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    hook = DenseWarmupHook(share=0.2)
    hook.before_train(runner)
    assert model.routing_state.dense
    for step, equal in ((0, True), (1, True), (2, False)):
        runner.iter = step
        hook.before_train_iter(runner, step)
        hook.after_train_iter(runner, step)
        first, second = model.net[0].experts
        assert torch.equal(first.weight, second.weight) is equal
    assert not model.routing_state.dense


def test_in_training_only_the_first_expert_runs_and_an_evaluation_uses_the_router():
    model = Regression(True)
    model.routing_state.dense = True
    broken = copy.deepcopy(model.net[0].experts[1])
    with torch.no_grad():
        broken.weight.fill_(float('nan'))
    model.net[0].experts[1] = broken
    x = torch.tensor([[1.0, 2, 3], [-1.0, 2, 3]])
    assert torch.isfinite(model.train()(x)).all()
    assert torch.isfinite(model.eval()(x)).tolist() == [True, False]


@pytest.mark.parametrize('share', [0, 1, 1.5, -0.1])
def test_a_share_that_leaves_one_of_the_phases_out_is_refused(share):
    with pytest.raises(ValueError, match=f'share must be between 0 and 1, got {share}'):
        DenseWarmupHook(share)


def test_a_dense_model_has_nothing_to_warm_up():
    runner = SimpleNamespace(model=Regression(False), max_iters=10)
    with pytest.raises(ValueError, match='the model has no MoE layers'):
        DenseWarmupHook(0.5).before_train(runner)


def test_experts_that_are_fresh_draws_have_no_warm_up_to_keep():
    model = Regression(moe=True)
    next(iter(moe_layers(model).values())).noise = 'independent'
    with pytest.raises(ValueError, match="noise='independent' at 'net.0' would draw .* anew"):
        DenseWarmupHook(share=0.5).before_train(SimpleNamespace(model=model))
