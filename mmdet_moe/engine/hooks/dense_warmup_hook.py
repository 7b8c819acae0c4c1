from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.moe import moe_layers, spread_first_expert_, spread_optimizer_state_
from mmdet_moe.moe.layer import INDEPENDENT
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model


@HOOKS.register_module()
class DenseWarmupHook(Hook):
    """Train the dense model first, and let the experts part from it in the same run.

    Sparse upcycling (Komatsuzaki et al., ICLR 2023, section 3) without a second run, a checkpoint
    to carry over or a schedule to cut in two. During the first ``share`` of the steps every MoE
    layer runs its first expert for all images, routers and balance losses rest, and after each step
    the other experts are made its copies: what is validated or saved meanwhile is the dense model
    in the MoE model's shape. Then the experts part: the copies get the first expert's momentum, and
    each learns from the images its router sends. With ``noise=0`` and a router that keeps the dense
    function nothing jumps, but for batch norms in training mode, which then see the images of their
    own expert only.

    Args:
        share: Of all training steps, in (0, 1).

    Raises:
        ValueError: On another ``share``; at the start of training, if the model has no MoE layers.

    Example:
        >>> custom_hooks = [dict(type='DenseWarmupHook', share=0.5)]
    """

    # Before EMAHook (NORMAL), whose average of each expert is then the average of the first.
    priority = 'ABOVE_NORMAL'

    def __init__(self, share: float) -> None:
        if not 0 < share < 1:
            raise ValueError(f'DenseWarmupHook: share must be between 0 and 1, got {share}')
        self.share = share

    def dense_steps(self, runner: Runner) -> int:
        """The number of steps before the experts part."""
        return round(self.share * runner.max_iters)

    def before_train(self, runner: Runner) -> None:
        """Check that there is something to warm up, and set the mode of the layers."""
        model = unwrapped_model(runner)
        if not moe_layers(model):
            raise ValueError('DenseWarmupHook: the model has no MoE layers')
        for name, layer in moe_layers(model).items():
            if layer.noise == INDEPENDENT:
                raise ValueError(
                    f"DenseWarmupHook: noise='independent' at {name!r} would draw the experts anew "
                    f'after the warm-up and lose it; give a number'
                )
        _set_dense(model, runner.iter < self.dense_steps(runner))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Let the experts part when it is time."""
        if runner.iter != self.dense_steps(runner):
            return
        model = unwrapped_model(runner)
        _set_dense(model, False)
        spread_first_expert_(model)
        wrapper = runner.optim_wrapper
        parts = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        for part in parts:
            spread_optimizer_state_(model, part.optimizer)
        runner.logger.info(f'DenseWarmupHook: the experts part at step {runner.iter}')

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Keep all experts equal to the one that is trained."""
        if runner.iter < self.dense_steps(runner):
            spread_first_expert_(unwrapped_model(runner), noise=0.0)


def _set_dense(model: nn.Module, dense: bool) -> None:
    for layer in moe_layers(model).values():
        layer.state.dense = dense
