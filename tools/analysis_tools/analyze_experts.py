"""Look inside a MoE model: who does what, who is needed, and what for.

    python tools/analysis_tools/analyze_experts.py CONFIG CHECKPOINT [--out DIR]

Tests the model once with the ``ExpertRecordHook`` and then, unless ``--skip-ablation``, with each
expert alone, with equal weights and with the k = 1..E best experts, by the config's own evaluator.
Writes below DIR (default: ``experts`` beside the checkpoint)

    index.html      everything on one page, which needs no other file
    report.json     the numbers
    *.csv           experts, groups (classes, domains, levels, sizes), pairs, images, ablation
    *.png           the pictures
    expert_record/test.json   what the hook recorded

If the folder of the checkpoint (or DIR) has ``expert_record/training.json``, importance over
training is drawn too. How to read the pictures: docs/looking_inside.md.

Exit 2 and one line if the model has no MoE layers or an option does not suit it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled

# Before any config is read: with it, `_base_ = 'mmdet_moe::...'` means the shipped configs.
import mmdet_moe  # noqa: F401  isort: skip
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdet_moe.engine import ExpertRecordHook
from mmdet_moe.engine.expert_record import (
    AREAS,
    ExpertRecord,
    groups,
    object_levels,
    specialisation,
    statistics,
)
from mmdet_moe.engine.hooks.expert_record_hook import anchor_sizes
from mmdet_moe.engine.hooks.unwrap import unwrapped_model
from mmdet_moe.moe import forced_routing, moe_layers
from mmdet_moe.planning.checks import write_atomically
from mmdet_moe.visualization import expert_figures as figures

#: What models are usually compared by, best first.
METRICS = ('macro/coco/bbox_mAP', 'coco/bbox_mAP', 'accuracy/top1')
#: Below so many points t-SNE has no neighbourhoods to keep.
FEWEST_FOR_TSNE = 30


class AnalyzeError(ValueError):
    """What cannot be analysed; the message says why."""


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model and its test data')
    parser.add_argument('checkpoint', help='the trained model')
    parser.add_argument('--out', metavar='DIR', help='default: experts, beside the checkpoint')
    parser.add_argument('--images', type=int, default=12, help='images with coloured boxes (12)')
    parser.add_argument('--mosaic', type=int, default=400, help='most images in a mosaic (400)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='of drawn boxes (0.3)')
    parser.add_argument('--embedding', choices=['tsne', 'pca'], default='tsne')
    parser.add_argument('--layers', metavar='REGEX', help='draw only layers whose name matches')
    parser.add_argument('--skip-ablation', action='store_true', help='test once only')
    parser.add_argument('--metric', help='what the ablation shows (default: AP or accuracy)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change the config'
    )
    return parser.parse_args(argv)


def build_runner(args: argparse.Namespace, out: Path) -> tuple[Runner, ExpertRecordHook]:
    """A runner that records, on the test data in order."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    cfg.update(work_dir=str(out), load_from=args.checkpoint, resume=False, launcher='none')
    cfg.log_level = 'WARNING'
    if cfg.get('test_dataloader') is None:
        raise AnalyzeError(f'{args.config}: no test_dataloader')
    if 'shuffle' in cfg.test_dataloader.get('sampler', {}):
        cfg.test_dataloader.sampler.shuffle = False
    own = [h for h in cfg.get('custom_hooks') or () if 'ExpertRecordHook' not in str(h['type'])]
    cfg.custom_hooks = [*own, dict(type='mmdet_moe.ExpertRecordHook')]
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if not moe_layers(unwrapped_model(runner)):
        raise AnalyzeError(f'{args.config}: the model has no MoE layers')
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, ExpertRecordHook))
    return runner, hook


class _Tick(Hook):
    """Calls back after each batch of the test."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def after_test_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self.tick()


@torch.no_grad()
def evaluate(runner: Runner, tick: Callable[[], None]) -> dict[str, float]:
    """The test loop without its hooks: no logs, no files."""
    loop = runner.test_loop
    runner.model.eval()
    for batch in loop.dataloader:
        outputs = runner.model.test_step(batch)
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
        tick()
    return loop.evaluator.evaluate(len(loop.dataloader.dataset))


@dataclass
class Ablation:
    """Metrics under forced routing.

    Attributes:
        single: Expert -> metrics with it alone.
        equal: Metrics with equal weights.
        best: k -> metrics with the k best.
        notes: What could not be forced, and why.
    """

    single: dict[int, dict] = field(default_factory=dict)
    equal: dict = field(default_factory=dict)
    best: dict[int, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, dict]]:
        """(setting, metrics)."""
        yield from ((f'expert {e} alone', metrics) for e, metrics in self.single.items())
        if self.equal:
            yield 'equal weights', self.equal
        yield from ((f'k = {k}', metrics) for k, metrics in self.best.items())


def settings(model: torch.nn.Module) -> list[tuple[str, dict]]:
    """What is tested: (text, arguments of :func:`forced`)."""
    most = max(layer.num_experts for layer in moe_layers(model).values())
    return [
        *((f'expert {e} alone', dict(expert=e)) for e in range(most)),
        ('equal weights', dict(equal=True)),
        *((f'the {k} best', dict(k=k)) for k in range(1, most + 1)),
    ]


@contextlib.contextmanager
def forced(model: torch.nn.Module, what: Mapping[str, Any]) -> Iterator[None]:
    """Forced routing in all layers at once: a layer with fewer experts than others keeps its own
    routing where it lacks the expert, and takes all it has where k is more."""
    with contextlib.ExitStack() as stack:
        for layer in moe_layers(model).values():
            asked = dict(what)
            if asked.get('expert', -1) >= layer.num_experts:
                continue
            if 'k' in asked:
                asked['k'] = min(asked['k'], layer.num_experts)
            stack.enter_context(forced_routing(model, layers=[layer.name], **asked))
        yield


def ablate(runner: Runner, progress: Any) -> Ablation:
    """Test with every setting."""
    model = unwrapped_model(runner)
    found = Ablation()
    batches = len(runner.test_dataloader)
    for text, what in settings(model):
        task = progress.add_task(text, total=batches)
        try:
            with forced(model, what):
                metrics = evaluate(runner, lambda task=task: progress.advance(task))
        except ValueError as error:
            if 'forced_routing' not in str(error):
                raise
            found.notes.append(f'{text}: {error}')
            progress.remove_task(task)
            # What it was given before is still in it.
            runner.test_loop.evaluator = runner.build_evaluator(runner.cfg.test_evaluator)
            runner.test_loop.evaluator.dataset_meta = runner.test_dataloader.dataset.metainfo
            continue
        if 'expert' in what:
            found.single[what['expert']] = metrics
        elif 'k' in what:
            found.best[what['k']] = metrics
        else:
            found.equal = metrics
    return found


def main_metric(metrics: Mapping[str, Any], asked: str | None) -> str:
    """The metric the ablation shows.

    Raises:
        AnalyzeError: There is none, or not the one that was asked for.
    """
    numbers = [k for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)]
    if asked is not None and asked not in numbers:
        raise AnalyzeError(f'--metric: no value {asked!r}; there are {numbers}')
    for name in (asked, *METRICS, *numbers):
        if name in numbers:
            return name
    raise AnalyzeError(f'the evaluator gives no number: {dict(metrics)}')


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


class Images:
    """The images of a record, RGB, read when asked for."""

    def __init__(self, record: ExpertRecord, dataset: Any) -> None:
        self.record = record
        self.dataset = dataset
        self._thumbs: dict[tuple[int, int], np.ndarray] = {}

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3); grey where there is no file and the dataset has no picture."""
        import mmcv

        path = self.record.images[index]
        image = None
        if Path(path).is_file():
            image = mmcv.imread(path)[:, :, ::-1]
        elif path.isdigit() and int(path) < len(self.dataset):  # a dataset in memory (CIFAR)
            image = self.dataset.get_data_info(int(path)).get('img')
        if image is None:
            return np.full((figures.THUMB, figures.THUMB, 3), 200, dtype=np.uint8)
        return np.asarray(image)

    def thumb(self, index: int, size: int = figures.THUMB) -> np.ndarray:
        """(size, size, 3), made once."""
        if (index, size) not in self._thumbs:
            self._thumbs[index, size] = figures.thumbnail(self.read(index), size)
        return self._thumbs[index, size]


def embed(values: np.ndarray, method: str) -> tuple[np.ndarray, str]:
    """(n, 2) coordinates of n rows, and the name of the method."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == 'tsne' and len(values) >= FEWEST_FOR_TSNE:
        perplexity = min(30.0, (len(values) - 1) / 3)
        return TSNE(perplexity=perplexity, random_state=0).fit_transform(values), 't-SNE'
    points = PCA(min(2, *values.shape)).fit_transform(values)
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), 'PCA'


@torch.no_grad()
def detections(runner: Runner, record: ExpertRecord, indices: Sequence[int]) -> list[Any]:
    """Data samples with predictions, None for an image that the data does not give in order."""
    dataset = runner.test_dataloader.dataset
    head = getattr(unwrapped_model(runner), 'bbox_head', None)
    if hasattr(head, 'with_levels'):
        head.with_levels = True
    found = []
    for index in indices:
        (sample,) = runner.model.test_step(pseudo_collate([dataset[index]]))
        path = sample.metainfo.get('img_path')
        same = path is None or str(path) == record.images[index]
        found.append(sample if same else None)
    return found


def box_experts(
    sample: Any, weights: np.ndarray, by_level: bool, anchors: Sequence[np.ndarray], least: float
) -> tuple[np.ndarray, np.ndarray, str]:
    """Boxes above a score, the top expert of each, and where the levels are from.

    Args:
        sample: With ``pred_instances``.
        weights: (C, E) of the image.
        by_level: Whether the C calls are levels.
        anchors: Of each level, as :func:`object_levels` takes them.
        least: The score.
    """
    found = sample.pred_instances
    found = found[found.scores >= least].cpu()
    boxes = getattr(found.bboxes, 'tensor', found.bboxes).numpy()
    if not by_level:
        expert = int(weights.mean(0).argmax())
        return boxes, np.full(len(boxes), expert), "the image's top expert"
    if 'levels' in found:
        levels, source = found.levels.numpy(), 'levels as the head reports them'
    else:
        scale = np.array(sample.metainfo.get('scale_factor', (1.0, 1.0)))[:2]
        sizes = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64) * scale
        levels = object_levels(sizes, anchors) if len(boxes) else np.zeros(0, np.int64)
        source = "levels by the boxes' sizes (the head reports none)"
    return boxes, weights.argmax(1)[levels], source


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A picture of the page.

    Attributes:
        path: The file.
        caption: How to read it.
    """

    path: Path
    caption: str


def draw_layer(
    record: ExpertRecord,
    name: str,
    numbers: Mapping[str, Any],
    images: Images,
    samples: Mapping[int, Any],
    anchors: Sequence[np.ndarray],
    history: Sequence[Mapping],
    args: argparse.Namespace,
    folder: Path,
) -> list[Picture]:
    """All pictures of a layer, whose statistics are ``numbers``."""
    layer = record.layers[name]
    drawn: list[Picture] = []

    def picture(kind: str, caption: str) -> Path:
        path = folder / f'{_file_name(name)}-{kind}.png'
        drawn.append(Picture(path, caption))
        return path

    figures.draw_utilisation(
        picture(
            'utilisation',
            'Filled: mean combine weight of each expert. Hatched: share of the items that took it. '
            f'An expert lives whose mean weight is above .01: {numbers["living"]} of '
            f'{layer.num_experts} do.',
        ),
        numbers['mean_weight'],
        numbers['utilisation'],
        f'{name}: CV of importance {numbers["cv_importance"]:.3f}, of counts '
        f'{numbers["cv_count"]:.3f}',
    )
    if layer.num_experts > 1 and numbers['effective_k']['selected'] > 1:
        figures.draw_pairs(
            picture(
                'pairs',
                "Of the items of the row's expert, the share that the column's expert takes too. "
                'Experts of a bright pair work as one.',
            ),
            layer.pairs,
            f'{name}: experts that share items',
        )
    found = groups(record, name)
    for kind, what, members in (
        ('class', 'classes', 'objects'),
        ('domain', 'domains', 'items'),
    ):
        if kind not in found or len(found[kind].names) < 2:
            continue
        group, information = found[kind], numbers['information'][kind]
        figures.draw_groups(
            picture(
                what,
                f'Mean combine weight over the {members} of each of the {what} (their number in '
                'brackets), grouped by the expert a row takes more than others do, the most '
                'special first. Bars: by how much its experts differ from the average.',
            ),
            group.names,
            group.mean,
            group.number,
            specialisation(group.weight),
            f'{name}: {what} and experts\nmutual information {information["mi"]:.3f} nats '
            f'(normalised {information["nmi"]:.3f})',
        )
    panels = {
        title: (found[kind].names, found[kind].mean)
        for kind, title in (
            ('level', 'all decisions of a level'),
            ('area', 'objects of a size'),
            ('level_area', 'objects of each level and size'),
        )
        if kind in found
    }
    if panels:
        caption = (
            'Mean combine weight. An object belongs to the level its anchors lie on, so size and '
            'level go together: compare sizes within one level before saying that experts know '
            'the size.'
            if 'level' in found
            else f'Mean combine weight of the images of objects of each size ({", ".join(AREAS)}).'
        )
        figures.draw_sizes(picture('sizes', caption), panels, f'{name}: level and size')
    _draw_mosaic(record, name, images, args, picture)
    _draw_preferred(record, name, images, picture)
    if samples:
        _draw_boxes(record, name, images, samples, anchors, args, picture)
    entries = [entry for entry in history if name in entry['layers']]
    if entries:
        importance = np.array([entry['layers'][name]['importance'] for entry in entries])
        shares = importance / np.maximum(importance.sum(1, keepdims=True), 1e-12)
        figures.draw_training(
            picture('training', 'Share of the importance in training; grey: even.'),
            [entry['iter'] for entry in entries],
            shares,
            f'{name}: importance over training',
        )
    return drawn


def _draw_mosaic(
    record: ExpertRecord,
    name: str,
    images: Images,
    args: argparse.Namespace,
    picture: Callable[[str, str], Path],
) -> None:
    layer = record.layers[name]
    logits = len(layer.logits) > 0
    rows = layer.logit_images if logits else np.arange(len(record.images))
    values = layer.logits if logits else layer.weight
    if len(rows) < 3:
        return
    chosen = np.unique(
        np.linspace(0, len(rows) - 1, min(args.mosaic, len(rows))).round().astype(int)
    )
    points, method = embed(values[chosen].reshape(len(chosen), -1), args.embedding)
    shown = rows[chosen].tolist()
    what = 'gate logits' if logits else 'combine weights (the router gives no logits)'
    levels = ' of all levels' if record.by_level(name) else ''
    figures.draw_mosaic(
        picture(
            'mosaic',
            f'{len(shown)} images at the place that {method} gives their {what}{levels}, moved to '
            'a grid; the frame is the colour of the expert with the largest weight.',
        ),
        [images.thumb(i) for i in shown],
        points,
        [int(e) for e in layer.weight[shown].mean(1).argmax(1)],
        f'{name}: {method} of the {what}',
    )


def _draw_preferred(
    record: ExpertRecord, name: str, images: Images, picture: Callable[[str, str], Path]
) -> None:
    weight = record.layers[name].weight.mean(1)
    mean = ' (mean over the levels)' if record.by_level(name) else ''
    # Among equal weights (k = 1) not the first images of the data, but any.
    order = np.random.default_rng(0).permutation(len(weight))
    rows = {}
    for e in range(weight.shape[1]):
        best = order[np.argsort(-weight[order, e], kind='stable')[:8]]
        rows[e] = [
            (images.thumb(i, 2 * figures.THUMB), float(weight[i, e]))
            for i in best.tolist()
            if weight[i, e] > 0
        ]
    figures.draw_preferred(
        picture('preferred', f'The images of largest combine weight for each expert{mean}.'),
        rows,
        f'{name}: images that each expert prefers',
    )


def _draw_boxes(
    record: ExpertRecord,
    name: str,
    images: Images,
    samples: Mapping[int, Any],
    anchors: Sequence[np.ndarray],
    args: argparse.Namespace,
    picture: Callable[[str, str], Path],
) -> None:
    boxed, source = [], ''
    for index, sample in samples.items():
        boxes, experts, source = box_experts(
            sample,
            record.layers[name].weight[index],
            record.by_level(name) and bool(anchors),
            anchors,
            args.score_thr,
        )
        domain = record.domains[index]
        title = f'{len(boxes)} boxes' if domain is None else f'{domain}, {len(boxes)} boxes'
        boxed.append(figures.BoxedImage(images.read(index), boxes, experts.tolist(), title))
    figures.draw_boxes(
        picture(
            'boxes',
            f'Detections with a score of {args.score_thr:g} or more, in the colour of their top '
            f'expert; {source}.',
        ),
        boxed,
        f'{name}: detections by expert',
    )


def _file_name(layer: str) -> str:
    return re.sub(r'[^\w.-]+', '_', layer)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_tables(
    record: ExpertRecord,
    numbers: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Any],
    ablation: Ablation | None,
    out: Path,
) -> None:
    """The CSV files; ``numbers`` are the layers' statistics."""
    keys = ('importance', 'count', 'mean_weight', 'utilisation')
    write_csv(
        out / 'experts.csv',
        ['layer', 'expert', *keys],
        (
            [name, e, *(found[key][e] for key in keys)]
            for name, found in numbers.items()
            for e in range(found['num_experts'])
        ),
    )
    write_csv(
        out / 'groups.csv',
        ['layer', 'kind', 'name', 'members', 'expert', 'weight', 'count', 'mean_weight'],
        (
            [name, kind, row, round(float(number), 3), e, *np.round([weight, count, mean], 5)]
            for name in record.layers
            for kind, group in groups(record, name).items()
            for row, number, weights, counts, means in zip(
                group.names, group.number, group.weight, group.count, group.mean, strict=True
            )
            for e, (weight, count, mean) in enumerate(zip(weights, counts, means, strict=True))
        ),
    )
    write_csv(
        out / 'pairs.csv',
        ['layer', 'expert', 'other', 'items'],
        (
            [name, e, other, items]
            for name, found in numbers.items()
            for e, row in enumerate(found['pairs'])
            for other, items in enumerate(row)
        ),
    )
    write_csv(
        out / 'images.csv',
        ['image', 'domain', 'layer', 'call', 'expert', 'weight', 'share'],
        (
            [path, record.domains[i] or '', name, call, e, *np.round([weight, share], 5)]
            for name, layer in record.layers.items()
            for i, path in enumerate(record.images)
            for call in range(layer.calls)
            for e, (weight, share) in enumerate(
                zip(layer.weight[i, call], layer.share[i, call], strict=True)
            )
        ),
    )
    settings_ = [('as routed', metrics), *(ablation.rows() if ablation else ())]
    write_csv(
        out / 'ablation.csv',
        ['setting', 'metric', 'value'],
        ([text, key, value] for text, found in settings_ for key, value in found.items()),
    )


def plain(value: Any) -> Any:
    """For JSON, which knows no nan."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { border-bottom: 1px solid #ccc; margin-top: 2.2em; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right;
border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
figure { margin: 1.4em 0; } img { max-width: 100%; } figcaption { color: #555; max-width: 46em; }
code { background: #f4f4f4; padding: 0 .2em; } nav a { margin-right: 1em; }
"""


def page(
    args: argparse.Namespace,
    record: ExpertRecord,
    numbers: Mapping[str, Mapping[str, Any]],
    metric: str,
    metrics: Mapping[str, Any],
    pictures: Mapping[str, Sequence[Picture]],
    notes: Sequence[str],
) -> str:
    """The HTML page, with the pictures in it; ``numbers`` are the layers' statistics."""
    text = html.escape
    body = [
        f'<h1>Experts of {text(Path(args.config).stem)}</h1>',
        f'<p>{text(args.checkpoint)}; {len(record.images)} images, {len(record.objects)} objects; '
        f'{text(metric)} {metrics[metric]:.4g}.</p>',
        '<nav>',
        *(f'<a href="#{text(_file_name(name))}">{text(name)}</a>' for name in pictures),
        '</nav>',
        _summary(numbers),
        *(f'<p>{text(note)}</p>' for note in notes),
    ]
    for name, shown in pictures.items():
        body.append(f'<h2 id="{text(_file_name(name))}">{text(name)}</h2>')
        for picture in shown:
            data = base64.b64encode(picture.path.read_bytes()).decode()
            body.append(
                f'<figure><img alt="{text(picture.path.stem)}" src="data:image/png;base64,{data}">'
                f'<figcaption>{text(picture.caption)}</figcaption></figure>'
            )
    title = text(f'Experts of {Path(args.config).stem}')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<style>{STYLE}</style></head>\n<body>\n' + '\n'.join(body) + '\n</body></html>\n'
    )


def _summary(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    head = ['layer', 'experts', 'living', 'CV importance', 'CV counts', 'k selected', 'k effective']
    kinds = ('domain', 'class', 'level', 'area')
    rows = []
    for name, found in numbers.items():
        information = found['information']
        rows.append(
            [
                name,
                str(found['num_experts']),
                str(found['living']),
                f'{found["cv_importance"]:.3f}',
                f'{found["cv_count"]:.3f}',
                f'{found["effective_k"]["selected"]:.2f}',
                f'{found["effective_k"]["entropy"]:.2f}',
                *(f'{information[k]["mi"]:.3f}' if k in information else '–' for k in kinds),
            ]
        )
    head += [f'MI {kind}' for kind in kinds]

    def line(cells: Sequence[str], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells) + '</tr>'

    table = line(head, 'th') + ''.join(line(row, 'td') for row in rows)
    return (
        f'<table>{table}</table><p>Living: mean weight above .01. CV: standard deviation over '
        'mean, 0 when all experts are used alike. MI: mutual information between the expert and '
        'the domain, class, level or object size, in nats.</p>'
    )


# --------------------------------------------------------------------------------------------------


def read_history(*folders: Path) -> list[dict]:
    """What the hook noted in training, from the first folder that has it."""
    for folder in folders:
        file = folder / 'expert_record' / 'training.json'
        if file.is_file():
            return json.loads(file.read_text())['entries']
    return []


def analyze(args: argparse.Namespace, out: Path, progress: Any) -> str:
    """Do it all; a line that says what came out.

    Raises:
        AnalyzeError: It cannot be done.
    """
    if min(args.images, args.mosaic) < 0:
        raise AnalyzeError('--images and --mosaic must be >= 0')
    runner, hook = build_runner(args, out)
    model = unwrapped_model(runner)
    task = progress.add_task('as routed', total=len(runner.test_dataloader))
    runner.register_hook(_Tick(lambda: progress.advance(task)))
    metrics = runner.test()
    metric = main_metric(metrics, args.metric)
    record = hook.record
    if record is None or not record.layers:
        raise AnalyzeError('no MoE layer decides over the images of the batch')
    shown = [name for name in record.layers if re.search(args.layers or '', name)]
    if not shown:
        raise AnalyzeError(f'--layers: none of {list(record.layers)} matches {args.layers!r}')
    ablation = None if args.skip_ablation else ablate(runner, progress)

    images = Images(record, runner.test_dataloader.dataset)
    samples: dict[int, Any] = {}
    is_detector = (record.objects.area >= 0).any()
    if is_detector and args.images:
        places = np.linspace(0, len(record.images) - 1, min(args.images, len(record.images)))
        indices = np.unique(places.round().astype(int)).tolist()
        found = zip(indices, detections(runner, record, indices), strict=True)
        samples = {i: sample for i, sample in found if sample is not None}
    history = read_history(Path(args.checkpoint).parent, out)
    anchors = list(anchor_sizes(model).values())
    pictures: dict[str, list[Picture]] = {}
    notes = list(ablation.notes) if ablation else []
    if ablation is not None:
        pictures['ablation'] = [draw_ablation(model, record, metric, metrics, ablation, out)]
    task = progress.add_task('pictures', total=len(shown))
    numbers = {name: statistics(record, name) for name in record.layers}
    for name in shown:
        pictures[name] = draw_layer(
            record, name, numbers[name], images, samples, anchors, history, args, out
        )
        progress.advance(task)
    write_tables(record, numbers, metrics, ablation, out)
    report = {
        'config': os.path.abspath(args.config),
        'checkpoint': os.path.abspath(args.checkpoint),
        'images': len(record.images),
        'objects': len(record.objects),
        'metric': metric,
        'metrics': metrics,
        'ablation': None
        if ablation is None
        else {'single': ablation.single, 'equal': ablation.equal, 'k': ablation.best},
        'notes': notes,
        'layers': numbers,
        'pictures': [p.path.name for shown in pictures.values() for p in shown],
    }
    write_atomically(out / 'report.json', json.dumps(plain(report), indent=1) + '\n')
    write_atomically(
        out / 'index.html', page(args, record, numbers, metric, metrics, pictures, notes)
    )
    return f'{out / "index.html"}: {metric} {metrics[metric]:.4g}, {len(record.layers)} layer(s)'


def draw_ablation(
    model: torch.nn.Module,
    record: ExpertRecord,
    metric: str,
    metrics: Mapping,
    ablation: Ablation,
    out: Path,
) -> Picture:
    """The picture of the ablation."""
    path = out / 'ablation.png'
    layers = moe_layers(model).values()
    figures.draw_ablation(
        path,
        metric,
        metrics[metric],
        # COCO's metric says nothing at all where nothing was detected.
        {f'e{e}': found.get(metric, math.nan) for e, found in ablation.single.items()},
        ablation.equal.get(metric) if ablation.equal else None,
        {k: found.get(metric, math.nan) for k, found in ablation.best.items()},
        sorted({layer.router.k for layer in layers if getattr(layer.router, 'k', None)}),
    )
    caption = (
        'All MoE layers at once. Left: every item to one expert, and to all with equal weights; '
        'experts that do well alone are generalists. Right: the k experts of largest logit, '
        "weighed by the router's own rule; its own k is the model as routed."
    )
    return Picture(path, caption + sums_caption(record))


def sums_caption(record: ExpertRecord) -> str:
    """What to bear in mind where a router's weights do not sum to 1; else nothing."""
    sums = {}
    for name, layer in record.layers.items():
        items = max(int(layer.items.sum()), 1)
        sums[name] = float((layer.weight.sum(2) * layer.items).sum()) / items
    other = [f'{name} {total:.2f}' for name, total in sums.items() if abs(total - 1) > 1e-3]
    if not other:
        return ''
    return (
        f' As routed the weights of an item do not sum to 1 (on average {", ".join(other)}), but '
        'one expert and equal weights do, and with k the sum may change: the scale of the output '
        'changes with them, and a difference may be that of the scale and not of the experts.'
    )


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    args = parse_args(argv)
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / 'experts'
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn('{task.description:>16}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    try:
        # Evaluators print tables, once for each of the many tests.
        with (out / 'log.txt').open('w') as log, contextlib.redirect_stdout(log), progress:
            line = analyze(args, out, progress)
    except AnalyzeError as error:
        print(f'analyze_experts: {error}', file=sys.stderr)
        return 2
    print(line)
    return 0


if __name__ == '__main__':
    sys.exit(main())
