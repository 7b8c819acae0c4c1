from __future__ import annotations

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.moe import PlanRouter, check_datasets, moe_layers
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model

#: Where a checkpoint keeps it: ``checkpoint['meta'][KEY]``.
KEY = 'moe_assignment'


@HOOKS.register_module()
class PlanHook(Hook):
    """Refuse a plan that was not made for the data, and a silent change of plan.

    Training starts only if the plan's datasets are those of the training data; the error lists
    both. And the checkpoint keeps the plan's map, to say so when another plan meets the weights:

    The plan is a file beside the config, the experts' weights are in the checkpoint. If the file
    is made anew after training, a dataset may be sent to an expert that never saw it, and nothing
    but the metrics would tell. With this hook a checkpoint carries ``dataset -> experts`` of each
    MoE layer, and loading it under a plan that says otherwise is a warning that names the datasets.
    It is no error: planning again and training on from there is what one does with a newcomer.

    Args:
        subset: Let the plan have datasets that the training data has not, for training a part of
            the domains only.
    """

    def __init__(self, subset: bool = False) -> None:
        self.subset = subset

    def before_train(self, runner: Runner) -> None:
        """Compare the plan's datasets with the training data's domains.

        Raises:
            ValueError: They differ; both sides are listed.
        """
        meta = getattr(runner.train_loop.dataloader.dataset, 'metainfo', None) or {}
        if 'domains' not in meta:
            return
        domains = list(meta['domains'])
        if self.subset:
            # A plan may stand within a router that learns from it (DAMEX).
            routers = unwrapped_model(runner).modules()
            domains += [x for r in routers if isinstance(r, PlanRouter) for x in r.datasets]
        check_datasets(unwrapped_model(runner), domains)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write the map into the checkpoint's meta."""
        assignment = plan_assignment(unwrapped_model(runner))
        if assignment:
            checkpoint.setdefault('meta', {})[KEY] = assignment

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint's map with this model's."""
        trained = (checkpoint.get('meta') or {}).get(KEY)
        if not trained:
            return
        moved = moved_datasets(trained, plan_assignment(unwrapped_model(runner)))
        if moved:
            runner.logger.warning(
                'PlanHook: the checkpoint was trained with another plan. Datasets whose experts '
                f'are not those they were trained with: {"; ".join(moved)}'
            )


def plan_assignment(model: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """MoE layer -> dataset -> expert -> combine weight, for the layers routed by a plan."""
    return {
        name: layer.router.assignment()
        for name, layer in moe_layers(model).items()
        if isinstance(layer.router, PlanRouter)
    }


def moved_datasets(trained: Mapping, now: Mapping) -> list[str]:
    """Datasets that were trained with other experts, once each: ``'bccd: e0 -> e1'``.

    Layers and datasets that only one of the two has are left out: they are new or gone, not moved.

    Args:
        trained: The assignment in the checkpoint, as :func:`plan_assignment` gives it.
        now: The model's.
    """
    moved = {}
    for layer in trained.keys() & now.keys():
        for dataset in trained[layer].keys() & now[layer].keys():
            before, after = trained[layer][dataset], now[layer][dataset]
            if before != after:
                moved[dataset] = f'{dataset}: {"+".join(before)} -> {"+".join(after)}'
    return [moved[dataset] for dataset in sorted(moved)]
