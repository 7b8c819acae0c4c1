"""What recording costs: test runs with and without the ExpertRecordHook, in turns.

    python benchmarks/expert_record.py [--data ../shared/data/mini_uodb] [--rounds 41]

The model is RetinaNet on EfficientNet-Lite0 at 320 px with every convolution of both subnets made
four experts behind a top-2 gate: four layers that decide for each image on each of four FPN levels.
A run is mmengine's whole test loop: loading images, the detector, the evaluator. The images are
mini_uodb's, or, where that is not there, generated ones. Exit 1 if the median of the ratios of
neighbouring runs is above 1.03.

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


def build(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, str]:
    """A runner ready to test, its hook, and what the images are."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    import mmdet_moe  # noqa: F401  (teaches the config reader our name)
    from mmdet_moe.engine import ExpertRecordHook

    if Path(args.data).is_dir():
        what, name = 'mini_uodb', 'mini-uodb'
        os.environ['MINI_UODB'] = f'{Path(args.data).resolve()}/'
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
    cfg.custom_hooks = [dict(type='ExpertRecordHook')]
    cfg.update(work_dir=str(folder / 'run'), log_level='ERROR', randomness=dict(seed=args.seed))
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


def main() -> int:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', default=str(ROOT.parent / 'shared' / 'data' / 'mini_uodb'))
    parser.add_argument('--images', type=int, default=4, help='of each domain')
    parser.add_argument('--rounds', type=int, default=41)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='work_dirs/benchmarks/expert_record.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance(args.seed)
    origin['versions']['torch'] = torch.__version__
    runs: dict[str, list[float]] = {'without': [], 'with': []}
    console = Console(stderr=True)
    # Evaluators print tables.
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as null:
        with contextlib.redirect_stdout(null):
            runner, hook, what = build(args, Path(folder))
            spent = watch(hook)
            inside = []
            rounds = range(args.rounds)
            for i in track(rounds, 'runs', console=console, disable=not sys.stderr.isatty()):
                # Who begins changes, so that neither always comes second.
                for record in ((False, True), (True, False))[i % 2]:
                    key = 'with' if record else 'without'
                    runs[key].append(seconds(runner, hook, record))
                    if record:
                        inside.append(spent() / runs[key][-1])
        images = len(runner.test_dataloader.dataset)
    ratios = [a / b for a, b in zip(runs['with'], runs['without'], strict=True)]
    ratio = statistics.median(ratios)
    rows = [
        [f'{key} the hook', f'{statistics.median(found):.3f}', f'{min(found):.3f}']
        for key, found in runs.items()
    ]
    print(table([f'{images} images ({what})', 'median s', 'least s'], rows), end='\n\n')
    measured = f'{ratio:.4f}x, median of {args.rounds} pairs ({min(ratios):.3f}-{max(ratios):.3f})'
    promise = Promise(f'recording slows a test by at most {LIMIT}x', measured, ratio <= LIMIT)
    print(verdict([promise]))
    share = statistics.median(inside)
    print(f'      inside of the hook: {share:.2%} of a run, median')
    content = {
        **origin,
        'images': images,
        'data': what,
        'ratio': ratio,
        'inside': inside,
        'seconds': runs,
    }
    write_json(args.out, {**content, 'promises': [promise]})
    return 0 if promise.kept else 1


if __name__ == '__main__':
    sys.exit(main())
