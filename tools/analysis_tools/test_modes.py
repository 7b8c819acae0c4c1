"""Test a detector with its domains given and guessed, in one run, and say how good the guess is.

    python tools/analysis_tools/test_modes.py CONFIG CHECKPOINT \\
        --modes given nearest mixture --guess embedder features \\
        --out-md modes.md --out-json modes.json

Modes: ``given`` (every image's domain is told), ``nearest`` (an image is taken for one of the
domain whose prototype is nearest: its experts and its classes), ``mixture`` (experts are mixed by
the posterior over domains; classes are the nearest's). The guess is made by the plan's frozen
``embedder``, a second network, or by pooled ``features`` of the detector's own, whose prototypes
are in the checkpoint (``DomainPrototypeHook``) or measured first, on training images. Every mode is
read twice: scores restricted to the (guessed) domain's classes, and unrestricted, where all classes
compete. A model without experts that a plan routes has no mixture.

The cost of a guess: milliseconds for an image (median of 20, batch of one, this machine) and
multiply-adds. ``--save FILE`` writes the checkpoint with the prototypes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled
sys.path.insert(0, str(Path(__file__).resolve().parent))

import mmdet_moe  # noqa: F401  isort: skip
import torch
from compare_runs import markdown_table
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_moe.engine.complexity import test_shape
from mmdet_moe.engine.domain_prototypes import measure_prototypes, prototype_dataset
from mmdet_moe.engine.hooks.unwrap import unwrapped_model
from mmdet_moe.models.checkpoint import save_tensors
from mmdet_moe.models.domain_features import pool_features
from mmdet_moe.models.moe_mixin import DOMAIN_MODES, GUESSES
from mmdet_moe.planning.checks import write_atomically

GROUPS = ('macro', 'small', 'large')
ACCURACY = 'guess/accuracy'
UNRESTRICTED = 'unrestricted/'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model and its test data')
    parser.add_argument('checkpoint', help='what to test')
    parser.add_argument('--modes', nargs='+', choices=DOMAIN_MODES, default=list(DOMAIN_MODES))
    parser.add_argument('--guess', nargs='+', choices=GUESSES, default=list(GUESSES))
    parser.add_argument(
        '--layer', help='feature layer, measured anew; default: the last without experts'
    )
    parser.add_argument(
        '--measure', action='store_true', help='measure prototypes even if the checkpoint has some'
    )
    parser.add_argument('--max-images', type=int, default=200, help='measured of each domain')
    parser.add_argument('--save', metavar='FILE.pth', help='write the checkpoint with prototypes')
    parser.add_argument(
        '--metrics', nargs='+', default=['coco/bbox_mAP', 'coco/bbox_mAP_50'], metavar='METRIC'
    )
    parser.add_argument('--no-unrestricted', action='store_true', help='leave that reading out')
    parser.add_argument('--work-dir', help='folder for the log')
    parser.add_argument('--out-md', metavar='FILE', help='write the tables there too')
    parser.add_argument('--out-json', metavar='FILE', help='write everything there as data')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    return parser.parse_args(argv)


def build_runner(args: argparse.Namespace) -> Runner:
    """The runner, its model loaded, with what the modes need."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.model.both_readings = not args.no_unrestricted
    if 'features' in args.guess:
        features = dict(cfg.model.get('domain_features') or {})
        cfg.model.domain_features = {**features, **({'layer': args.layer} if args.layer else {})}
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    return runner


def plan_of_tests(model: Any, args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """(mode, guess) of every test, and what is left out and why."""
    tests: list[tuple[str, str]] = [('given', '')] if 'given' in args.modes else []
    notes = []
    for by in args.guess:
        for mode in args.modes:
            if mode == 'given':
                continue
            if mode == 'mixture' and not model.plan_routers():
                notes.append(f'mixture ({by}): no experts that a plan routes')
                continue
            try:
                model.set_domain_mode(mode, by)
            except ValueError as error:
                notes.append(f'{mode} ({by}): {error}')
                continue
            tests.append((mode, by))
    model.set_domain_mode('given')
    return tests, notes


def cost_of_guess(model: Any, cfg: Config, by: str) -> dict[str, float]:
    """Milliseconds and multiply-adds of guessing one image's domain, beside the detector."""
    device = next(model.parameters()).device
    shape = test_shape(cfg)
    generator = torch.Generator().manual_seed(0)
    if by == 'embedder':
        image = torch.rand(3, *shape, generator=generator).mul(255).to(device)
        means = torch.tensor([list(mean) for mean in model._prototypes['mean'].values()])
        embedder = model._embedder.module(device)
        seen = torch.zeros(1, 3, embedder.size, embedder.size, device=device)
        adds = FlopAnalyzer(embedder.backbone, (seen,)).total() + means.numel()

        def guess() -> None:
            (model._embedder.embed([image]).cpu() @ means.t()).argmax(1)
    else:
        kept: list[Any] = []
        layer = dict(model.named_modules())[model.domain_features.layer]
        handle = layer.register_forward_hook(
            lambda module, inputs, output: kept.append(output), prepend=True
        )
        try:
            model.pooled_features(torch.zeros(1, 3, *shape, device=device))
        finally:
            handle.remove()
        output = kept[0]
        while isinstance(output, (tuple, list)):
            output = output[-1]
        means = model.domain_features.mean.cpu()
        # A mean over H x W places of every channel, and the similarities.
        adds = output.numel() + means.numel()

        def guess() -> None:
            (pool_features(output).cpu() @ means.t()).argmax(1)

    return {'ms_per_image': _median_ms(guess), 'multiply_adds': float(adds)}


def _median_ms(function: Callable[[], None], repeats: int = 20) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def name_of(mode: str, by: str) -> str:
    return f'{mode} ({by})' if by else mode


def to_markdown(report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """A table for each metric and reading, then the guess and its cost."""
    modes: dict[str, dict] = report['modes']
    lines: list[str] = []
    some = next(iter(modes.values()))
    for metric in metrics:
        for reading in ('', UNRESTRICTED):
            columns = _columns(some, f'{reading}{metric}')
            if not columns:
                continue
            header = [f'{metric}, {"all classes" if reading else "own classes"}']
            header += ['mean' if name == 'macro' else name for name in columns]
            rows = [
                [name, *(_number(values.get(f'{column}/{reading}{metric}')) for column in columns)]
                for name, values in modes.items()
            ]
            lines += [*markdown_table(header, rows), '']
    guesses: dict[str, dict] = report['guess']
    if guesses:
        columns = _columns(next(iter(guesses.values()))['accuracy'], ACCURACY)
        columns = [column for column in columns if column not in GROUPS[1:]]
        header = ['domain guessed right, %', *('mean' if c == 'macro' else c for c in columns)]
        rows = [
            [by, *(f'{100 * found["accuracy"][f"{c}/{ACCURACY}"]:.1f}' for c in columns)]
            for by, found in guesses.items()
        ]
        lines += [*markdown_table([*header], rows), '']
        rows = [
            [by, f'{found["ms_per_image"]:.2f}', f'{found["multiply_adds"] / 1e6:.2f} M']
            for by, found in guesses.items()
        ]
        lines += [*markdown_table(['cost of a guess', 'ms per image', 'multiply-adds'], rows), '']
    lines += [f'- {note}' for note in report['notes']]
    return '\n'.join(lines).rstrip() + '\n'


def _columns(values: Mapping[str, Any], metric: str) -> list[str]:
    """The domains that report a metric, then the means."""
    names = [key.removesuffix(f'/{metric}') for key in values if key.endswith(f'/{metric}')]
    names = [name for name in names if '/' not in name]
    means = [name for name in GROUPS if name in names]
    return [*(name for name in names if name not in GROUPS), *means]


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'


def write(report: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the files that the command line asks for."""
    if args.out_md:
        write_atomically(args.out_md, to_markdown(report, args.metrics))
    if args.out_json:
        write_atomically(args.out_json, json.dumps(report, indent=2) + '\n')


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    runner = build_runner(args)
    model, cfg = unwrapped_model(runner), runner.cfg
    anew = args.measure or args.layer  # the checkpoint does not say of which layer it has some
    if model.domain_features is not None and (anew or not model.domain_features.measured):
        images = measure_prototypes(model, prototype_dataset(cfg), args.max_images)
        print(f'prototypes of {model.domain_features.layer}: {images} training images')
    if args.save:
        checkpoint = CheckpointLoader.load_checkpoint(args.checkpoint, map_location='cpu')
        state = checkpoint.setdefault('state_dict', {})
        features = model.domain_features.state_dict() if model.domain_features is not None else {}
        state.update({f'domain_features.{key}': value.cpu() for key, value in features.items()})
        save_tensors(args.save, checkpoint)
    tests, notes = plan_of_tests(model, args)
    if not tests:
        print(f'test_modes: nothing can be tested: {"; ".join(notes)}', file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        'config': os.path.abspath(args.config),
        'checkpoint': os.path.abspath(args.checkpoint),
        'layer': None if model.domain_features is None else model.domain_features.layer,
        'modes': {},
        'guess': {},
        'notes': notes,
    }
    for mode, by in tests:
        model.set_domain_mode(mode, by or None)
        found = {
            key: float(value) if math.isfinite(value) else None
            for key, value in runner.test().items()
            if isinstance(value, (int, float))
        }
        accuracy = {key: value for key, value in found.items() if key.endswith(ACCURACY)}
        report['modes'][name_of(mode, by)] = {k: v for k, v in found.items() if k not in accuracy}
        if by and by not in report['guess']:
            model.set_domain_mode('given')
            report['guess'][by] = {'accuracy': accuracy, **cost_of_guess(model, cfg, by)}
        write(report, args)  # after every test: an interrupted run has what was done
    print(to_markdown(report, args.metrics), end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
