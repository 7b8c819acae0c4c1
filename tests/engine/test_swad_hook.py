"""SWAD against its algorithm, written out here over all steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_moe.engine.hooks import DGRecordHook, LossValley, SWADHook


def by_the_algorithm(losses, thetas, n_s, n_e, r):
    """Algorithm 1 of arXiv 2102.08604: ``losses[i]`` follows the steps ``thetas[i]``."""
    t_s, t_e, limit = 0, len(losses) - 1, None
    for i in range(len(losses)):
        if limit is None:
            if i >= n_s - 1 and losses[i - n_s + 1] == min(losses[i - n_s + 1 : i + 1]):
                t_s = i - n_s + 1
                limit = r / n_s * sum(losses[i - n_s + 1 : i + 1])
        elif limit < min(losses[max(0, i - n_e + 1) : i + 1]):
            t_e = i - n_e
            break
    return np.concatenate(thetas[t_s : t_e + 1]).mean(), (t_s, t_e)


def through_the_valley(losses, thetas, n_s, n_e, r, stop_after=None):
    valley = LossValley(n_s, n_e, r)
    for i, (loss, steps) in enumerate(zip(losses, thetas, strict=True)):
        if i == stop_after:  # a checkpoint
            state = valley.state_dict()
            valley = LossValley(n_s, n_e, r)
            valley.load_state_dict(state)
        mean = {'w': torch.tensor(steps.mean(), dtype=torch.float64)}
        valley.update(loss, mean, len(steps))
        assert len(valley.pending) < max(n_s, n_e)
    return valley.average()['w'].item(), valley


def test_by_hand():
    # N_s = 2: 5 > 4 > 3, then 3 <= 3.5: it begins at the third (3); l = 1.2 * 3.25 = 3.9.
    # N_e = 2: 3.8 is below l; 4, 5 are both above: it ends before them, with 3.8.
    losses = [5, 4, 3, 3.5, 3.8, 4, 5, 1]
    thetas = [np.array([10.0 * i, 10.0 * i + 2]) for i in range(8)]  # means 1, 11, 21, ...
    mean, valley = through_the_valley(losses, thetas, 2, 2, 1.2)
    assert valley.threshold == pytest.approx(3.9)
    assert (valley.start, valley.end) == (3, 5)
    assert mean == pytest.approx((21 + 31 + 41) / 3)


def test_equals_the_algorithm_on_random_curves_also_across_a_checkpoint():
    rng = np.random.default_rng(0)
    spans = set()
    for _ in range(300):
        n_s, n_e, r = int(rng.integers(1, 5)), int(rng.integers(1, 7)), 1 + 0.4 * rng.random()
        losses = list(3 - rng.random() * np.sin(np.arange(20) / rng.integers(2, 9)) * 2)
        losses = [float(loss + 0.5 * rng.random()) for loss in losses]
        thetas = [rng.normal(size=int(rng.integers(1, 5))) for _ in losses]
        expected, span = by_the_algorithm(losses, thetas, n_s, n_e, r)
        mean, _ = through_the_valley(losses, thetas, n_s, n_e, r, int(rng.integers(20)))
        assert mean == pytest.approx(expected, abs=1e-12)
        spans.add(span)
    assert len(spans) > 30  # begins and ends all over the place


def test_without_a_valley_all_steps_are_averaged():
    thetas = [np.array([float(i)]) for i in range(6)]
    mean, valley = through_the_valley([6, 5, 4, 3, 2, 1], thetas, 3, 6, 1.3)
    assert valley.start is None and mean == pytest.approx(2.5)


def test_settings_below_one_are_refused():
    with pytest.raises(ValueError, match='at least 1, got 3, 6 and 0.3'):
        LossValley(tolerance_ratio=0.3)


class HalfFrozen(nn.Module):
    """Its first layer is frozen, but keeps its flag in evaluation mode, as in ``MoEMixin``."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def train(self, mode=True):
        self.frozen.requires_grad_(not mode)
        return super().train(mode)


def test_a_model_with_frozen_parts_is_averaged_in_what_trains(tmp_path):
    model, hook, seen = HalfFrozen().train(), SWADHook(), []
    meta = dict(domains=['a', 'b'], held_out=['b'])
    runner = SimpleNamespace(model=model, hooks=[DGRecordHook()], work_dir=str(tmp_path))
    runner.val_loop = SimpleNamespace(
        run=lambda: seen.append(model.head.weight[0, 0].item()),
        dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=meta)),
    )
    for weight in (1.0, 3.0, 5.0):
        model.train()
        model.head.weight.data.fill_(weight)
        hook.after_train_iter(runner, 0)
        model.eval()
        hook.after_val_epoch(runner, {'dg/a/val/nll': 6 - weight})
    hook.after_train(runner)
    assert seen == pytest.approx([3.0])  # (1 + 3 + 5) / 3 was evaluated
    assert model.head.weight[0, 0].item() == 5.0  # the model is as trained
    saved = torch.load(tmp_path / 'swad.pth', weights_only=True)['state_dict']
    assert torch.equal(saved['frozen.weight'], model.frozen.weight)
