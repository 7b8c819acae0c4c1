"""MoE detectors: exact at step 0, trainable, and at home in mmengine's machinery."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import CONFIGS, build, images, mixed_batch, moe_specs, street_sample, total_loss

KINDS = list(CONFIGS)


def run_loss(model, batch, seed=3):
    torch.manual_seed(seed)
    inputs, samples = batch
    return model.loss(inputs, copy.deepcopy(samples))


def run_predict(model, batch):
    inputs, samples = batch
    with torch.no_grad():
        return [s.pred_instances for s in model.predict(inputs, copy.deepcopy(samples))]


@pytest.mark.parametrize('kind', KINDS)
def test_moe_model_computes_what_its_dense_twin_does_at_step_0(kind):
    batch = mixed_batch()
    dense = build(kind)
    moe = build(kind, moe=moe_specs(kind))
    assert moe.moe_names and not dense.moe_names

    expected, got = run_loss(dense, batch), run_loss(moe, batch)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)

    dense.eval(), moe.eval()
    for one, other in zip(run_predict(dense, batch), run_predict(moe, batch), strict=True):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.bboxes, other.bboxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_one_seed_gives_moe_model_and_dense_twin_the_same_weights(kind):
    dense = dict(build(kind).named_parameters())
    moe = build(kind, moe=moe_specs(kind))
    shared = {k: v for k, v in moe.named_parameters() if k in dense}
    assert shared
    for key, value in shared.items():
        assert torch.equal(value, dense[key]), key
    for name, layer in moe.moe_layers().items():
        for expert in layer.experts:
            for key, value in expert.named_parameters():
                assert torch.equal(value, dense[f'{name}.{key}']), f'{name}.{key}'


@pytest.mark.parametrize('kind', KINDS)
def test_train_step_moves_the_experts_of_the_batch_and_no_other(kind):
    model = build(kind, moe=moe_specs(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    losses = run_loss(model, (images(2), [street_sample(), street_sample()]))
    total_loss(losses).backward()
    optimizer.step()
    after = model.state_dict()
    for name in model.moe_names:
        for expert, moves in ((0, True), (1, False), (2, False)):
            keys = [k for k in after if k.startswith(f'{name}.experts.{expert}.')]
            moved = [k for k in keys if not torch.equal(before[k], after[k])]
            assert bool(moved) is moves, (name, expert, moved)
