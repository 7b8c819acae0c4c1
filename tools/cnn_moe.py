"""Soft and hard constraints on real images: the experiment of arXiv 2204.10598 in small.

Trains ResNet-18 with four experts in the place of its last stage on the emoji images, five styles
at once and without telling the router the style, with each way of balancing the experts and several
seeds; then measures, on concepts that were held out of training, what the experts are used for::

    python tools/cnn_moe.py --data ../shared/data/emoji_dg --seeds 0 1 2 --jobs 2

and prints a table, mean ± sample standard deviation over the seeds: accuracy with the router's own
k; coefficient of variation of the experts' importance; living experts (mean weight > .01);
effective k; mutual information of expert and style, and of expert and class, in nats (in brackets:
normalised, see ``mmdet_moe.evaluation.expert_statistics``); accuracy with the best 1, 2 and all
experts of each image.

Everything is left in ``work_dirs/cnn_moe``: ``<setting>/seed<N>/train``, the measured numbers in
``<setting>/seed<N>/statistics.json``, the table in ``table.md`` and ``results.json``. Steps whose
inputs have not changed are not done again, so that more seeds, or a run that was interrupted, cost
what is missing. Every training has one thread, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import steps as job
from analysis_tools.compare_runs import Cell, markdown_table, write

SETTINGS = {
    'importance': 'importance (soft)',
    'kl': 'KL (soft)',
    'relative': 'relative (hard)',
    'mean': 'mean (hard)',
    'none': 'none',
    'dense': 'dense network',
}


def config_of(setting: str) -> str:
    """The config file of a setting, from the repository's root."""
    name = 'dense' if setting == 'dense' else f'moe-e4-{setting}'
    return f'configs/cnn_moe/resnet18_{name}_emoji.py'


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def measure(config: str, checkpoint: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """What a trained model scores on the test images, and what its experts do there.

    Args:
        config: Its config file.
        checkpoint: Its weights.
        options: Changes of the config it was trained with, ``KEY=VALUE``.

    Returns:
        ``accuracy`` in %. With a MoE layer also ``accuracy_k<n>`` for n = 1, 2 and E, and
        everything of ``expert_statistics``.

    Raises:
        ValueError: There is more than one MoE layer.
    """
    import numpy as np
    import torch
    import train
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner
    from mmpretrain.apis import get_model

    from mmdet_moe.evaluation import expert_statistics
    from mmdet_moe.moe import forced_routing

    arguments = [str(job.ROOT / config), *(['--cfg-options', *options] if options else [])]
    cfg = train.read_config(train.parse_args(arguments))
    init_default_scope(cfg.default_scope)
    model = get_model(cfg, pretrained=str(checkpoint), device='cpu')
    batches = list(Runner.build_dataloader(cfg.test_dataloader))
    samples = [sample for batch in batches for sample in batch['data_samples']]
    classes = np.array([sample.gt_label.item() for sample in samples])

    @torch.no_grad()
    def accuracy() -> float:
        found = [sample.pred_label.item() for batch in batches for sample in model.test_step(batch)]
        return float((np.array(found) == classes).mean() * 100)

    if not model.moe_names:
        return {'accuracy': accuracy()}
    if len(model.moe_names) > 1:
        raise ValueError(f'{config}: want one MoE layer, there are {model.moe_names}')
    weights = []

    def observe(layer: str, routing: Any, context: Any) -> None:
        weights.append(routing.to_dense())

    model.routing_state.observers.append(observe)
    result = {'accuracy': accuracy()}
    model.routing_state.observers.remove(observe)
    result |= expert_statistics(
        torch.cat(weights).numpy(), [sample.domain for sample in samples], classes
    )
    for k in sorted({1, 2, len(result['share'])}):
        with forced_routing(model, k=k):
            result[f'accuracy_k{k}'] = accuracy()
    return result


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def cells(results: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """The numbers of one setting, over its seeds."""
    numbers = [key for key, value in results[0].items() if isinstance(value, (int, float))]
    return {key: Cell([float(result[key]) for result in results]) for key in numbers}


def to_markdown(settings: Mapping[str, Mapping[str, Cell]]) -> str:
    """One row per setting."""
    counts = sorted(
        {
            int(key.removeprefix('accuracy_k'))
            for found in settings.values()
            for key in found
            if key.startswith('accuracy_k')
        }
    )
    header = ['balance', 'accuracy %', 'CV', 'living', 'effective k', 'I(expert; style)']
    header += ['I(expert; class)', *(f'% at k = {k}' for k in counts)]
    rows = []
    for setting, found in settings.items():
        row = [SETTINGS[setting], _text(found, 'accuracy', 1), _text(found, 'cv', 2)]
        row += [_text(found, 'living', 1), _text(found, 'effective_k', 2)]
        for label in ('domain', 'class'):
            share = _text(found, f'nmi_{label}', 3, spread=False)
            row.append(_text(found, f'mi_{label}', 3) + (f' ({share})' if share else ''))
        rows.append([*row, *(_text(found, f'accuracy_k{k}', 1) for k in counts)])
    return '\n'.join(markdown_table(header, rows)) + '\n'


def _text(found: Mapping[str, Cell], key: str, digits: int, spread: bool = True) -> str:
    if key not in found:
        return ''
    cell = found[key]
    text = f'{cell.mean:.{digits}f}'
    return text if cell.std is None or not spread else f'{text} ± {cell.std:.{digits}f}'


# --------------------------------------------------------------------------------------------------
# The job
# --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """All steps; the exit code."""
    data = Path(os.path.expanduser(args.data)).resolve()
    if not data.is_dir():
        raise job.StepError(f'{data} is not a folder: give --data DIR')
    out = Path(args.out).resolve()
    os.environ['EMOJI_DG'] = f'{data}/'  # for the trainings, and the configs that are read here
    env = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1'), **job.devices()}
    files = [str(path.relative_to(data)) for path in sorted(data.rglob('*'))]
    inputs = f'{job.source_digest()} {sys.version_info[:2]} {data} {files}'

    def train(steps: job.Steps, setting: str, seed: int) -> Path:
        what = f'train {setting} (seed {seed})'
        folder = steps.log.parent / 'train'
        options = list(args.cfg_options)
        if setting != 'dense':  # the experts' fresh draws have a seed of their own
            options.append(f'model.moe.0.noise_seed={seed}')
        return job.train(steps, what, config_of(setting), folder, seed, options)

    runs = [(setting, seed) for seed in args.seeds for setting in args.settings]
    tasks = []
    for setting, seed in runs:
        folder = out / setting / f'seed{seed}'
        folder.mkdir(parents=True, exist_ok=True)
        steps = job.Steps(folder, inputs, env, label=f'{setting}/{seed} ' if args.jobs > 1 else '')
        tasks.append((steps, functools.partial(train, setting=setting, seed=seed)))
    checkpoints = job.run_all(tasks, args.jobs)

    results: dict[str, list[dict[str, Any]]] = {setting: [] for setting in args.settings}
    for (setting, seed), (steps, _), checkpoint in zip(runs, tasks, checkpoints, strict=True):
        file = steps.log.parent / 'statistics.json'

        def action(
            _: bool, file: Path = file, setting: str = setting, checkpoint: Path = checkpoint
        ) -> None:
            job.write_json(file, measure(config_of(setting), checkpoint, args.cfg_options))

        steps.step('measure', f'measure {setting} (seed {seed})', action, '', [file])
        results[setting].append(json.loads(file.read_text()))

    found = {setting: cells(values) for setting, values in results.items()}
    table = to_markdown(found)
    write(out / 'table.md', table)
    job.write_json(
        out / 'results.json',
        {
            'seeds': args.seeds,
            'settings': {
                setting: {key: cell.to_dict() for key, cell in row.items()}
                for setting, row in found.items()
            },
        },
    )
    print(f'\n{table}\nruns  {out}')
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', required=True, help='the folder emoji_dg')
    parser.add_argument('--out', default='work_dirs/cnn_moe', help='default: %(default)s')
    parser.add_argument(
        '--settings',
        nargs='+',
        choices=SETTINGS,
        default=[setting for setting in SETTINGS if setting != 'dense'],
        help='default: all but dense',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--jobs', type=_positive, default=1, help='trainings at once (default: 1)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='changes of all configs: train_cfg.max_epochs=2',
    )
    args = parser.parse_args(argv)
    return job.call('cnn_moe', lambda: run(args), Path(args.out).resolve())


if __name__ == '__main__':
    sys.exit(main())
