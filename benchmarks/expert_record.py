"""What recording costs: test runs with and without the ExpertRecordHook, in turns.

    python benchmarks/expert_record.py [--only detector,classifier] [--rounds 41]

detector    RetinaNet on EfficientNet-Lite0 at 320 px with every convolution of both subnets made
            four experts behind a top-2 gate: four layers that decide for each image on each of four
            FPN levels; mini_uodb's images, or, where that is not there, generated ones
classifier  configs/cnn_moe/resnet18_moe-e4-importance_emoji.py, a ResNet-18 at 32 px with one
            layer: about the fastest network that anybody tests, so that the hook weighs most;
            emoji_dg's images, or as many generated ones

A run is mmengine's whole test loop: loading images, the model, the evaluator. Exit 1 if the median
of the ratios of neighbouring runs is above 1.03.

Shared machines drift, so the runs are many and short; and they are noisy, so the time inside of the
hook's own methods is given too (without its observer's, which only appends to a list).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Promise, provenance, table, verdict, write_json

sys.path.insert(0, str(ROOT))  # to run from a clone, uninstalled

LIMIT = 1.03
#: Everything the hook does in a test.
PARTS = ('before_test_epoch', 'before_test_iter', 'after_test_iter', 'after_test_epoch')


def detector(args: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """The config, and what its images are."""
    from mmengine.config import Config

    data = Path(args.data) / 'mini_uodb'
    if data.is_dir():
        what, name = 'mini_uodb', 'mini-uodb'
        os.environ['MINI_UODB'] = f'{data.resolve()}/'
    else:
        what, name = 'generated', 'demo'
        os.environ['MMDET_MOE_DEMO_DATA'] = f'{folder}/data/'
        made = ['--out', f'{folder}/data', '--images', '8', '--val-images', '10', '--size', '320']
        tool = [sys.executable, str(ROOT / 'tools' / 'make_domains.py'), *made]
        subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    cfg = Config.fromfile(ROOT / f'configs/gem/dense-retinanet_effnet-lite0_{name}.py')
    cfg.model.moe = [
        dict(
            targets=r'bbox_head\.(cls|reg)_convs\.\d',
            num_experts=4,
            router=dict(type='TopKRouter', k=2),
            noise=0.1,
        )
    ]
    for domain in cfg.test_dataloader.dataset.domains.values():
        domain.indices = args.images
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize':
            step.scale = (320, 320)
    return cfg, what


def classifier(args: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """The config, and what its images are."""
    import mmcv
    import numpy as np
    from mmengine.config import Config

    data, what = Path(args.data) / 'emoji_dg', 'emoji_dg'
    if not data.is_dir():
        data, what = folder / 'emoji', 'generated'
        rng = np.random.default_rng(args.seed)
        for i in range(4900):  # a fifth of them is tested
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            mmcv.imwrite(image, str(data / f'style{i % 5}' / f'class{i // 5 % 6}' / f'{i}.png'))
    os.environ['EMOJI_DG'] = f'{data.resolve()}/'
    return Config.fromfile(ROOT / 'configs/cnn_moe/resnet18_moe-e4-importance_emoji.py'), what


MODELS = {'detector': detector, 'classifier': classifier}


def build(name: str, args: argparse.Namespace, folder: Path) -> tuple[Any, Any, str]:
    """A runner ready to test, its hook, and what the images are."""
    from mmengine.runner import Runner

    import mmdet_moe  # noqa: F401  (teaches the config reader our name)
    from mmdet_moe.engine import ExpertRecordHook

    cfg, what = MODELS[name](args, folder)
    # The config may have the hook already.
    own = [h for h in cfg.get('custom_hooks') or () if 'ExpertRecordHook' not in h['type']]
    cfg.custom_hooks = [*own, dict(type='mmdet_moe.ExpertRecordHook')]
    cfg.update(
        work_dir=str(folder / name),
        experiment_name=f'expert_record_{name}',
        log_level='ERROR',
        randomness=dict(seed=args.seed),
    )
    cfg.default_hooks.pop('visualization', None)
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    runner.test()  # warms up, and puts the hooks in their place
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, ExpertRecordHook))
    return runner, hook, what


def seconds(runner: Any, hook: Any, record: bool) -> float:
    """Processor time of one test run."""
    hooks = runner._hooks
    runner._hooks = [other for other in hooks if record or other is not hook]
    gc.collect()  # not in the time of who happens to come when it is due
    try:
        start = time.process_time()
        runner.test_loop.run()
        return time.process_time() - start
    finally:
        runner._hooks = hooks


def watch(hook: Any) -> Callable[[], float]:
    """Let the hook's methods add up their processor time; read it, and begin anew."""
    spent = [0.0]

    def timed(method: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> None:
            start = time.process_time()
            method(*args, **kwargs)
            spent[0] += time.process_time() - start

        return run

    for name in PARTS:
        setattr(hook, name, timed(getattr(hook, name)))

    def read() -> float:
        found, spent[0] = spent[0], 0.0
        return found

    return read


def measure(
    name: str, args: argparse.Namespace, folder: Path, console: Any
) -> tuple[dict[str, Any], Promise, str]:
    """The numbers of one model, the promise and a table."""
    from rich.progress import track

    runner, hook, what = build(name, args, folder)
    spent = watch(hook)
    runs: dict[str, list[float]] = {'without': [], 'with': []}
    inside = []
    for i in track(range(args.rounds), name, console=console, disable=not sys.stderr.isatty()):
        # Who begins changes, so that neither always comes second.
        for record in ((False, True), (True, False))[i % 2]:
            key = 'with' if record else 'without'
            runs[key].append(seconds(runner, hook, record))
            if record:
                inside.append(spent())
    ratios = [a / b for a, b in zip(runs['with'], runs['without'], strict=True)]
    ratio = statistics.median(ratios)
    images = len(runner.test_dataloader.dataset)
    rows = [
        [f'{key} the hook', f'{statistics.median(found):.3f}', f'{min(found):.3f}']
        for key, found in runs.items()
    ]
    rows.append(['inside of it', f'{statistics.median(inside):.4f}', f'{min(inside):.4f}'])
    share = statistics.median(a / b for a, b in zip(inside, runs['with'], strict=True))
    measured = f'{ratio:.4f}x, median of {args.rounds} pairs ({min(ratios):.3f}-{max(ratios):.3f})'
    promise = Promise(
        f'{name}: recording slows a test by at most {LIMIT}x',
        f'{measured}; inside of the hook {share:.2%} of a run',
        ratio <= LIMIT,
    )
    numbers = {'images': images, 'data': what, 'ratio': ratio, 'inside': inside, 'seconds': runs}
    return (
        numbers,
        promise,
        table([f'{name}, {images} images ({what})', 'median s', 'least s'], rows),
    )


def main() -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', default=','.join(MODELS), help=f'of {", ".join(MODELS)}')
    parser.add_argument('--data', default=str(ROOT.parent / 'shared' / 'data'))
    parser.add_argument('--images', type=int, default=4, help='of each domain, for the detector')
    parser.add_argument('--rounds', type=int, default=41)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='work_dirs/benchmarks/expert_record.json')
    args = parser.parse_args()
    names = args.only.split(',')
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f'--only: no {unknown}; there are {list(MODELS)}')
    torch.set_num_threads(1)
    content = provenance(args.seed)
    content['versions']['torch'] = torch.__version__
    console = Console(stderr=True)
    promises, tables = [], []
    # Evaluators print tables.
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, 'w') as null,
        contextlib.redirect_stdout(null),
    ):
        for name in names:
            content[name], promise, text = measure(name, args, Path(folder), console)
            promises.append(promise)
            tables.append(text)
    print('\n\n'.join(tables), end='\n\n')
    print(verdict(promises))
    write_json(args.out, {**content, 'promises': promises})
    return 0 if all(promise.kept for promise in promises) else 1


if __name__ == '__main__':
    sys.exit(main())
