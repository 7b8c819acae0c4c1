"""SWAD: dense averaging of weights over the valley of the validation loss."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import save_checkpoint
from torch import Tensor, nn

from mmdet_moe.engine.hooks.dg_record_hook import DGRecordHook
from mmdet_moe.engine.hooks.unwrap import unwrapped_model
from mmdet_moe.registry import HOOKS

Weights = dict[str, Tensor]


class LossValley:
    r"""Which evaluations a training's average spans (Cha et al., arXiv 2102.08604, Algorithm 1).

    With :math:`E_i` the validation loss of the i-th evaluation:

    * it begins at the first :math:`t_s = i - N_s + 1` with
      :math:`E_{t_s} = \min_{0 \le j < N_s} E_{i-j}`, that is, when the loss has not become better
      in :math:`N_s` evaluations; then :math:`l = \frac{r}{N_s} \sum_{0 \le j < N_s} E_{i-j}`;
    * it ends at :math:`t_e = i - N_e` with the first i thereafter where
      :math:`\min_{0 \le j < N_e} E_{i-j} > l`, that is, when the loss was too high
      :math:`N_e` times in a row; with the last evaluation, where that does not happen;
    * where it does not begin, it spans the whole training.

    An evaluation stands for the steps since the one before: their mean weights are given to
    :meth:`update`, and :meth:`average` is the mean over the steps of all evaluations from
    :math:`t_s` to :math:`t_e`. At most max(N_s, N_e) + 1 copies of the weights are kept.

    Args:
        n_converge: N_s.
        n_tolerance: N_e.
        tolerance_ratio: r, at least 1.
    """

    def __init__(
        self, n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 1.3
    ) -> None:
        if n_converge < 1 or n_tolerance < 1 or tolerance_ratio < 1:
            raise ValueError(
                'n_converge, n_tolerance and tolerance_ratio must be at least 1, got '
                f'{n_converge}, {n_tolerance} and {tolerance_ratio}'
            )
        self.n_converge = n_converge
        self.n_tolerance = n_tolerance
        self.tolerance_ratio = tolerance_ratio
        self.losses: list[float] = []
        self.start: int | None = None
        self.end: int | None = None
        self.threshold: float | None = None
        self.sure: tuple[int, Weights] | None = None  # in the average whatever comes
        self.pending: list[tuple[int, Weights]] = []  # the last evaluations

    def update(self, loss: float, weights: Weights, steps: int) -> None:
        """One evaluation.

        Args:
            loss: The validation loss.
            weights: Mean weights of the steps since the last evaluation.
            steps: Their number.
        """
        if self.end is not None:
            return
        self.losses.append(loss)
        self.pending.append((steps, weights))
        number = len(self.losses)
        recent = self.losses[-self.n_converge :]
        if self.threshold is not None:
            if min(self.losses[-self.n_tolerance :]) > self.threshold:
                self.end = number - self.n_tolerance
                self.pending = []
            keep = self.n_tolerance - 1
        elif len(recent) == self.n_converge and recent[0] == min(recent):
            self.start = number - self.n_converge + 1
            self.threshold = self.tolerance_ratio * statistics.fmean(recent)
            self.sure, self.pending = None, self.pending[-self.n_converge :]
            keep = self.n_tolerance - 1
        else:
            keep = self.n_converge - 1
        while len(self.pending) > keep:
            self.sure = _merge(self.sure, self.pending.pop(0))

    def average(self) -> Weights | None:
        """The mean weights so far, None before the first evaluation."""
        total = self.sure
        for segment in self.pending:
            total = _merge(total, segment)
        return None if total is None else total[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers and tensors."""
        keys = ('losses', 'start', 'end', 'threshold', 'sure', 'pending')
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        for key, value in state.items():
            setattr(self, key, value)


def _merge(one: tuple[int, Weights] | None, two: tuple[int, Weights]) -> tuple[int, Weights]:
    """The mean of two means over numbers of steps."""
    if one is None:
        return two
    steps = one[0] + two[0]
    share = two[0] / steps
    return steps, {name: torch.lerp(value, two[1][name], share) for name, value in one[1].items()}


@HOOKS.register_module()
class SWADHook(Hook):
    """Average the weights of all steps over the valley of the validation loss, and evaluate them.

    For any model in the DomainBed protocol. The validation loss is the mean cross-entropy on the
    sources' ``val`` part (``DomainAccuracy``, ``DGDataset``). What is averaged are the trainable
    parameters and the floating-point buffers (running statistics of batch norms; DomainBed's are
    frozen). After training the averaged model is evaluated once, as ``model: swad`` in the records
    of ``DGRecordHook``, and saved as ``<work_dir>/swad.pth``; the model itself is left as trained.

    The averages are part of every checkpoint, so that a resumed training gives the same.

    Args:
        n_converge, n_tolerance, tolerance_ratio: See :class:`LossValley`. The paper's are 3, 6 and
            1.3 (VLCS: 1.2).

    Example:
        >>> custom_hooks = [..., dict(type='mmdet_moe.SWADHook', tolerance_ratio=1.2)]
    """

    priority = 'LOW'  # before the checkpoint is written

    def __init__(
        self, n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 1.3
    ) -> None:
        self.valley = LossValley(n_converge, n_tolerance, tolerance_ratio)
        self.steps = 0
        self.mean: Weights = {}
        self.evaluating = False

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        if self.valley.end is not None:
            return
        self.steps += 1
        weights = _weights(unwrapped_model(runner))
        if self.steps == 1:
            self.mean = {name: value.detach().clone() for name, value in weights.items()}
        else:
            for name, value in weights.items():
                mean = self.mean[name].to(value.device)  # a checkpoint's are on the CPU
                self.mean[name] = mean.lerp_(value.detach(), 1 / self.steps)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self.evaluating or not self.steps:
            return
        loss = _source_loss(runner, metrics or {})
        self.valley.update(loss, {k: v.cpu() for k, v in self.mean.items()}, self.steps)
        self.steps, self.mean = 0, {}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint['swad'] = dict(
            valley=self.valley.state_dict(), steps=self.steps, mean=dict(self.mean)
        )

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if 'swad' in checkpoint and runner._resume:
            state = checkpoint['swad']
            self.valley.load_state_dict(state['valley'])
            self.steps, self.mean = state['steps'], state['mean']

    def after_train(self, runner: Any) -> None:
        average = self.valley.average()
        if average is None:
            raise ValueError(
                'SWADHook: the training was never evaluated; see train_cfg.val_interval'
            )
        model = unwrapped_model(runner)
        # By name: after the last evaluation a model may show parameters that never trained.
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {name: named[name] for name in average}
        before = {name: value.detach().clone() for name, value in weights.items()}
        records = next((hook for hook in runner.hooks if isinstance(hook, DGRecordHook)), None)
        if records is None:
            raise ValueError('SWADHook needs DGRecordHook, which keeps its accuracies')
        self.evaluating = True
        try:
            _assign(weights, average)
            if is_main_process():
                meta = {'swad': [self.valley.start, self.valley.end]}
                content = {'meta': meta, 'state_dict': model.state_dict()}
                save_checkpoint(content, str(Path(runner.work_dir) / 'swad.pth'))
            with records.evaluating('swad'):
                runner.val_loop.run()
        finally:
            _assign(weights, before)
            self.evaluating = False


def _weights(model: nn.Module) -> Weights:
    """What changes in training: trainable parameters and floating-point buffers, by name."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found.update((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    return found


@torch.no_grad()
def _assign(weights: Weights, values: Weights) -> None:
    for name, value in weights.items():
        value.copy_(values[name])


def _source_loss(runner: Any, metrics: Mapping[str, float]) -> float:
    """Mean cross-entropy on the sources' ``val`` part."""
    meta = runner.val_loop.dataloader.dataset.metainfo
    sources = [domain for domain in meta['domains'] if domain not in meta['held_out']]
    try:
        return statistics.fmean(metrics[f'dg/{domain}/val/nll'] for domain in sources)
    except KeyError as error:
        raise ValueError(
            f"SWADHook needs the sources' validation loss: the metrics lack {error}; evaluate "
            "part 'val' with mmdet_moe.DomainAccuracy"
        ) from None
