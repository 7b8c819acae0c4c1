from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor, nn

from mmdet_moe.engine.expert_record import (
    ExpertRecord,
    LayerRecord,
    Objects,
    area_bins,
    object_levels,
    rounded,
)
from mmdet_moe.evaluation.expert_statistics import coefficient_of_variation, shares
from mmdet_moe.moe import MoELayer, Routing, RoutingContext, RoutingState, moe_layers
from mmdet_moe.moe.routing import effective_experts
from mmdet_moe.moe.soft import SlotRouting
from mmdet_moe.moe.state import stat_key
from mmdet_moe.planning.checks import write_atomically
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model

#: Blocked experts have a logit of -inf; JSON and PCA want numbers.
LOWEST_LOGIT = -1e4

Call = tuple[Routing | SlotRouting, RoutingContext]


@HOOKS.register_module()
class ExpertRecordHook(Hook):
    """Record which expert does what, in validation, test and training.

    **Validation and test.** Of every image, MoE layer and call (see
    :mod:`mmdet_moe.engine.expert_record`): combine weights, selections, effective number of
    experts, gate logits, co-activation of pairs of experts; and the ground truth, so that they can
    be summed over classes, domains, FPN levels and object sizes. Written as JSON to
    ``<work_dir>/expert_record/val.json`` and ``test.json`` (replaced each time); coefficient of
    variation of the importance, living experts, effective k and each expert's utilisation go to
    mmengine's visualizer, and so to TensorBoard and W&B.

    **Training.** The importance and number of items per expert, summed over ``interval``
    iterations, in ``training.json`` and the visualizer. An entry covers the ``steps`` iterations
    up to ``iter``: the last one of a run, and the first one of a run that was resumed within an
    interval, cover fewer. A resumed run goes on with the entries up to its checkpoint.

    *Objects.* Size classes are COCO's, by the area of the box in the original image. The level of
    an object is that of the anchors of best IoU, by its size in the network's input
    (:func:`~mmdet_moe.engine.expert_record.object_levels`); models without anchors have none. Test
    pipelines may load annotations before or after resizing: the dataset's pipeline tells which.
    Without ``scale_factor`` among the meta keys what needs it is unknown, with a warning. Images
    without labels are recorded without objects.

    Layers are observed, not changed, and what they decided is looked at once per batch. In several
    processes each records its images, without those that the sampler repeats to fill up; they meet
    at the end. Under test-time augmentation every view of an image counts as an image. A layer
    whose items are not the batch's images (RoI heads) is left out, with a warning.

    Args:
        interval: Training iterations of one entry.
        max_logits: Images whose gate logits are kept, for each process.
        folder: Below the work dir.

    Raises:
        ValueError: On an ``interval`` or ``max_logits`` that is no natural number.

    Example:
        >>> custom_hooks = [dict(type='ExpertRecordHook', interval=50)]
    """

    priority = 'LOW'

    def __init__(
        self, interval: int = 50, max_logits: int = 2000, folder: str = 'expert_record'
    ) -> None:
        if interval < 1 or max_logits < 0:
            raise ValueError(
                f'ExpertRecordHook: interval must be >= 1 and max_logits >= 0, got {interval} and '
                f'{max_logits}'
            )
        self.interval = interval
        self.max_logits = max_logits
        self.folder = folder
        #: What the last validation or test recorded (on the main process).
        self.record: ExpertRecord | None = None
        self._recorder: _Recorder | None = None
        self._layers: dict[str, MoELayer] = {}
        self._sums: dict[str, Tensor] = {}
        self._history: list[dict] = []
        #: Iterations in the sums, and the last one of them (counted from 1).
        self._steps = 0
        self._last = 0

    # -- validation and test ---------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        self._start(runner, runner.val_loop.dataloader.dataset)

    def before_test_epoch(self, runner: Runner) -> None:
        self._start(runner, runner.test_loop.dataloader.dataset)

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        if self._recorder is not None:
            self._recorder.calls.clear()

    before_test_iter = before_val_iter

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: Sequence | None = None,
    ) -> None:
        if self._recorder is not None:
            self._recorder.end_of_batch(data_batch)

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._finish(runner, 'val')

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._finish(runner, 'test')

    def _start(self, runner: Runner, dataset: Any) -> None:
        if self._recorder is not None:  # a loop that was left by an error
            self._recorder.detach()
        model = unwrapped_model(runner)
        self._recorder = None
        if not moe_layers(model):
            runner.logger.warning('ExpertRecordHook: the model has no MoE layers')
            return
        self._recorder = _Recorder(model, dataset, self.max_logits, runner.logger)

    def _finish(self, runner: Runner, mode: str) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        recorder.detach()
        record = recorder.record()
        if get_dist_info()[1] > 1:
            record = ExpertRecord.merge(all_gather_object(record))
        if not is_main_process():
            return
        self.record = record
        step = _iteration(runner)
        content = {'mode': mode, 'iter': step, **record.to_dict()}
        write_json(self._file(runner, mode), content)
        scalars = {}
        for name, numbers in content['statistics'].items():
            scalars.update(_scalars(f'{mode}/moe/{name}', numbers))
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)

    # -- training --------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Take up the history of a resumed run."""
        # By their own names, which the state's statistics have: of a module with two names,
        # `moe_layers` may know the other.
        layers = moe_layers(unwrapped_model(runner)).values()
        self._layers = {layer.name: layer for layer in layers}
        self._sums, self._history = {}, []
        self._steps, self._last = 0, runner.iter
        file = self._file(runner, 'training')
        if runner.iter > 0 and file.is_file():
            entries = json.loads(file.read_text())['entries']
            self._history = [entry for entry in entries if entry['iter'] <= runner.iter]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        for state in _states(self._layers):
            for key, value in state.stats().items():
                if key.endswith(('/weight', '/count')):
                    value = value.float()
                    known = self._sums.get(key)
                    self._sums[key] = value if known is None else known + value.to(known.device)
        self._steps += 1
        self._last = runner.iter + 1
        if self._layers and self._last % self.interval == 0:
            self._note(runner)

    def after_train(self, runner: Runner) -> None:
        """Note what is left of the last interval."""
        if self._layers and self._steps:
            self._note(runner)

    def _note(self, runner: Runner) -> None:
        device = next(unwrapped_model(runner).parameters()).device
        entry: dict[str, Any] = {}
        sums, self._sums = self._sums, {}
        steps, self._steps = self._steps, 0
        for name, layer in self._layers.items():
            none = torch.zeros(layer.num_experts + len(layer.router.extra_experts))
            total = torch.stack(
                [sums.get(stat_key(name, what), none).to(device) for what in ('weight', 'count')]
            )
            all_reduce(total)
            if not total.any():  # dense warm-up: nothing is routed
                continue
            weight, count = total.tolist()
            entry[name] = {'importance': rounded(weight, 3), 'count': rounded(count, 0)}
        if not entry or not is_main_process():
            return
        self._history.append({'iter': self._last, 'steps': steps, 'layers': entry})
        content = {'interval': self.interval, 'entries': self._history}
        write_json(self._file(runner, 'training'), content)
        scalars = {}
        for name, found in entry.items():
            importance = np.array(found['importance'])
            scalars[f'train/moe/{name}/cv_importance'] = coefficient_of_variation(importance)
            for e, share in enumerate(rounded(shares(importance))):
                scalars[f'train/moe/{name}/share_{e}'] = share
        runner.visualizer.add_scalars(scalars, step=self._last)

    def _file(self, runner: Runner, name: str) -> Path:
        return Path(runner.work_dir) / self.folder / f'{name}.json'


class _Recorder:
    """Observes the layers of a model during one loop."""

    def __init__(self, model: nn.Module, dataset: Any, max_logits: int, logger: Any) -> None:
        self.max_logits = max_logits
        self.logger = logger
        self.resized = annotations_are_resized(dataset)
        self.resizes = any('Resize' in type(step).__name__ for step in _transforms(dataset))
        self._warned = False
        self.anchors = anchor_sizes(model)
        self.size = len(dataset)
        self.classes = [str(name) for name in _metainfo(dataset).get('classes') or ()]
        self.states = _states(moe_layers(model))
        #: What the layers decided in this batch: (number of the forward, layer, call).
        self.calls: list[tuple[int, str, Call]] = []
        for state in self.states:
            state.observers.append(self.observe)
        self.images: list[str] = []
        self.domains: list[str | None] = []
        self.objects: list[Objects] = []
        self.features: dict[str, list[np.ndarray]] = defaultdict(list)
        self.items: dict[str, list[np.ndarray]] = defaultdict(list)
        self.logits: dict[str, list[np.ndarray]] = defaultdict(list)
        self.pairs: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self._seen = 0

    def observe(self, layer: str, routing: Routing | SlotRouting, context: RoutingContext) -> None:
        self.calls.append((context.state.forwards, layer, (routing, context)))

    def detach(self) -> None:
        """Look no longer."""
        for state in self.states:
            if self.observe in state.observers:
                state.observers.remove(self.observe)

    @torch.no_grad()
    def end_of_batch(self, data_batch: Any) -> None:
        """Add the batch's decisions, before the next forward begins."""
        calls, self.calls = self.calls, []
        forwards: dict[int, dict[str, list[Call]]] = defaultdict(lambda: defaultdict(list))
        for forward, layer, call in calls:
            forwards[forward][layer].append(call)
        views = list(_views(data_batch))
        # The sampler repeats images until every rank has equally many.
        rank, world = get_dist_info()
        number = len(views[0]) if views else 0
        places = (self._seen + np.arange(number)) * world + rank
        self._seen += number
        keep = places < self.size
        if not keep.any():
            return
        for samples, layers in zip(views, forwards.values(), strict=False):
            self._add_view(samples, layers, keep)

    def _add_view(
        self, samples: Sequence, layers: Mapping[str, list[Call]], keep: np.ndarray
    ) -> None:
        told = next(iter(layers.values()))[0][1].state.domains or [None] * len(samples)
        kept = keep.nonzero()[0].tolist()
        shown = [samples[i] for i in kept]
        self._add_objects(shown)
        self.images += [
            str(s.get('img_path') or s.get('img_id', s.get('sample_idx', ''))) for s in shown
        ]
        self.domains += [
            s.get('domain') if told[i] is None else told[i]
            for i, s in zip(kept, shown, strict=True)
        ]
        self.called.update(layers)
        for name, calls in layers.items():
            # Items of RoI heads and of windows are not the batch's images.
            if any(c.num_items != len(samples) * c.items_per_image for _, c in calls):
                continue
            features, pairs = reduce_calls([routing for routing, _ in calls], len(samples), keep)
            self.pairs[name] = self.pairs[name] + pairs if name in self.pairs else pairs
            host = features.cpu().numpy()
            host = host if keep.all() else host[keep]
            experts = pairs.shape[0]
            host, logits = np.split(host, [2 * experts + 1], axis=2)
            self.features[name].append(host)
            items = np.array([context.items_per_image for _, context in calls])
            self.items[name].append(np.broadcast_to(items, host.shape[:2]))
            left = self.max_logits - sum(len(x) for x in self.logits[name])
            if logits.shape[2] and left > 0:
                self.logits[name].append(logits[:left])

    def _add_objects(self, samples: Sequence) -> None:
        """The ground truth of the next images, as far as there is any."""
        numbers = range(len(self.images), len(self.images) + len(samples))
        boxed = []
        for number, sample in zip(numbers, samples, strict=True):
            truth = sample.get('gt_instances')
            if truth is not None and 'labels' in truth:
                boxed.append((number, sample, truth))
        labels: list[Tensor] = [truth.labels for _, _, truth in boxed]
        images = [number for number, *_ in boxed]
        if not boxed:
            found = [
                (number, s.get('gt_label')) for number, s in zip(numbers, samples, strict=True)
            ]
            images = [number for number, label in found if label is not None]
            labels = [label for _, label in found if label is not None]  # (1,), or (n,) of several
        if not labels:
            return
        sizes = [label.numel() for label in labels]
        label = torch.cat(labels).numpy(force=True).astype(np.int64)
        area, level = np.full((2, len(label)), -1)
        if boxed and len(label) and all('bboxes' in truth for *_, truth in boxed):
            area, level = self._sizes([(sample, truth) for _, sample, truth in boxed], area, level)
        self.objects.append(Objects(np.repeat(np.array(images), sizes), label, area, level))

    def _sizes(
        self, boxed: Sequence[tuple[Any, Any]], area: np.ndarray, level: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Areas (index) and levels of the objects of some images; as they were where unknown."""
        boxes = [getattr(truth.bboxes, 'tensor', truth.bboxes) for _, truth in boxed]
        corners = torch.cat([b.reshape(-1, 4) for b in boxes]).numpy(force=True).astype(np.float64)
        sides = corners[:, 2:] - corners[:, :2]
        factors = [sample.get('scale_factor') for sample, _ in boxed]
        known = None not in factors
        if not known and self.resizes and not self._warned:
            self._warned = True
            self.logger.warning(
                "ExpertRecordHook: the data samples have no 'scale_factor', so the "
                f'{"size classes" if self.resized else "FPN levels"} of the objects are unknown; '
                "add it to the meta_keys of the pipeline's packing step"
            )
        if not known and not self.resizes:
            factors, known = [(1.0, 1.0)] * len(boxed), True
        if known:
            scale = np.repeat(
                np.array([np.asarray(f, np.float64)[:2] for f in factors]),
                [len(b) for b in boxes],
                axis=0,
            )
        if known or not self.resized:
            area = area_bins((sides / scale if self.resized else sides).prod(1))
        if self.anchors and (known or self.resized):
            given = sides if self.resized else sides * scale
            level = object_levels(given, list(self.anchors.values()))
        return area, level

    def record(self) -> ExpertRecord:
        """What was seen, on this process."""
        whole = {
            name: blocks
            for name, blocks in self.features.items()
            if sum(len(block) for block in blocks) == len(self.images)
        }
        for name in sorted(self.called - whole.keys()):
            self.logger.warning(
                f'ExpertRecordHook: MoE layer {name!r} did not decide over the images of every '
                f'batch (are its items regions?); it is not recorded'
            )
        objects = Objects.empty()
        if self.objects:
            keys = ('image', 'label', 'area', 'level')
            objects = Objects(
                *(np.concatenate([getattr(part, key) for part in self.objects]) for key in keys)
            )
        classes = list(self.classes)
        most = int(objects.label.max()) + 1 if len(objects) else 0
        classes += [str(label) for label in range(len(classes), most)]
        return ExpertRecord(
            images=self.images,
            domains=self.domains,
            classes=classes,
            objects=objects,
            levels=list(self.anchors),
            layers={name: self._layer(name) for name in whole},
        )

    def _layer(self, name: str) -> LayerRecord:
        experts = self.pairs[name].shape[0]
        blocks = self.features[name]
        items = self.items[name]
        logits = self.logits[name]
        if len({block.shape[1] for block in blocks}) > 1:  # not called equally often in each batch
            blocks = [block.mean(1, keepdims=True) for block in blocks]
            logits = [block.mean(1, keepdims=True) for block in logits]
            items = [block.sum(1, keepdims=True) for block in items]
        features = np.concatenate(blocks)
        kept = np.concatenate(logits) if logits else np.zeros((0, features.shape[1], experts))
        return LayerRecord(
            weight=features[:, :, :experts],
            share=features[:, :, experts : 2 * experts],
            effective=features[:, :, 2 * experts],
            items=np.concatenate(items),
            pairs=self.pairs[name].cpu().numpy().astype(np.float64),
            logit_images=np.arange(len(kept)),
            logits=kept,
        )


# Pure functions


def reduce_calls(
    routings: Sequence[Routing | SlotRouting], images: int, keep: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """What is kept of the C calls of a layer in a forward of B images, on the layer's device.

    Args:
        routings: One per call; each has the items of image 0, then those of image 1 and so on.
        images: B.
        keep: (B,) whether an image counts for the pairs; None: all.

    Returns:
        (B, C, F) means over each decision's items of: E weights, E selections, the effective
        number of experts, and the E logits where the router has some; and the (E, E) numbers of
        items that took both experts.
    """
    weights = torch.cat([routing.to_dense().float() for routing in routings])
    chosen = (weights > 0).float()
    parts = [weights, chosen, effective_experts(weights)[:, None]]
    logits = [r.logits for r in routings if r.logits is not None]
    if len(logits) == len(routings):
        parts.append(torch.cat(logits).float().clamp(min=LOWEST_LOGIT).to(weights.device))
    sizes = [routing.num_items for routing in routings]
    by_call = torch.cat(parts, 1).split(sizes)
    features = torch.stack([call.view(images, -1, call.shape[1]).mean(1) for call in by_call], 1)
    if keep is not None and not keep.all():
        counted = torch.from_numpy(keep.astype(np.float32)).to(chosen.device)
        rows = [counted.repeat_interleave(size // images) for size in sizes]
        chosen = chosen * torch.cat(rows)[:, None]
    return features, (chosen.t() @ chosen).double()


def anchor_sizes(model: nn.Module) -> dict[str, np.ndarray]:
    """FPN level -> the (A, 2) width and height of its anchors, fine to coarse; empty without
    anchors. A level of stride 2^i is called Pi."""
    for key in ('bbox_head', 'rpn_head'):
        generator = getattr(getattr(model, key, None), 'prior_generator', None)
        base = getattr(generator, 'base_anchors', None)
        if base is not None:
            boxes = [anchors.numpy(force=True).astype(np.float64) for anchors in base]
            names = [f'P{math.log2(stride[0]):g}' for stride in generator.strides]
            return {n: box[:, 2:] - box[:, :2] for n, box in zip(names, boxes, strict=True)}
    return {}


def annotations_are_resized(dataset: Any) -> bool:
    """Whether boxes of the ground truth are in pixels of the network's input: the pipeline loads
    annotations before it resizes. Usual test pipelines load them after, in original pixels."""
    names = [type(step).__name__ for step in _transforms(dataset)]
    loads = [i for i, name in enumerate(names) if 'LoadAnnotations' in name]
    resizes = [i for i, name in enumerate(names) if 'Resize' in name]
    return bool(loads and resizes and loads[0] < resizes[0])


def _transforms(node: Any) -> Iterator[Any]:
    """The transforms of a dataset's (or of its first part's) pipeline, in order."""
    if isinstance(node, (list, tuple)):
        for step in node:
            yield from _transforms(step)
        return
    # Datasets and wrappers, Compose and its like, test-time augmentation.
    for key in ('pipeline', 'transforms', 'subroutines', 'dataset', 'datasets'):
        inner = getattr(node, key, None)
        if inner:
            found = list(
                _transforms(_first(inner) if key in ('subroutines', 'datasets') else inner)
            )
            if found:
                yield from found
                return
    if not hasattr(node, 'transforms'):
        yield node


def _first(parts: Any) -> Any:
    return next(iter(parts.values() if isinstance(parts, Mapping) else parts))


def _views(data_batch: Any) -> Iterator[Sequence]:
    """The data samples of each forward: one list, or one for each augmentation at test."""
    samples = data_batch['data_samples']
    if samples and isinstance(samples[0], (list, tuple)):
        yield from samples
    else:
        yield samples


def _states(layers: Mapping[str, MoELayer]) -> list[RoutingState]:
    """The routing states of the layers, each once; usually all have one."""
    return list({id(layer.state): layer.state for layer in layers.values()}.values())


def _metainfo(dataset: Any) -> Mapping[str, Any]:
    meta = getattr(dataset, 'metainfo', None) or {}
    return meta if isinstance(meta, Mapping) else meta[0]


def _iteration(runner: Runner) -> int:
    """The training iteration; asking the runner builds a train loop where there is none."""
    return runner.iter if isinstance(runner._train_loop, BaseLoop) else 0


def _scalars(prefix: str, numbers: Mapping[str, Any]) -> dict[str, float]:
    return {
        f'{prefix}/cv_importance': numbers['cv_importance'],
        f'{prefix}/living': numbers['living'],
        f'{prefix}/effective_k': numbers['effective_k']['entropy'],
        **{f'{prefix}/utilisation_{e}': v for e, v in enumerate(numbers['utilisation'])},
    }


def write_json(path: Path, content: Any) -> None:
    """Write a file that is never there in part."""
    write_atomically(path, json.dumps(content, separators=(',', ':'), check_circular=False) + '\n')


__all__ = ['ExpertRecordHook', 'anchor_sizes', 'annotations_are_resized', 'reduce_calls']
