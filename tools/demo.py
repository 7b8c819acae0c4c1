"""The main job from end to end on generated data: ``make demo``.

Six generated domains (``make_domains.py``) -> an expert map (``plan_experts.py``) -> GEM-RetinaNet
trained on all of them (``train.py``) -> tested per domain (``test.py``) -> a table and pictures.
Each step is one command of this repository, printed before it runs. A step whose inputs have not
changed since it was last done is skipped; an interrupted training goes on from its checkpoint.

Everything is left in one folder::

    work_dirs/demo/data/           the domains
    work_dirs/demo/plan.json       the expert map (and its table and picture)
    work_dirs/demo/gem/            training: logs, checkpoint
    work_dirs/demo/results.json    the table as data
    work_dirs/demo/pictures/       per domain: truth left, detections right
    work_dirs/demo/steps.log       the full output of all steps

Exit 0 if the model has learned: AP50 of at least 0.5 on average and 0.3 on every domain. Exit 1,
saying what is missing, otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import steps as job

ROOT = Path(__file__).resolve().parent.parent
CONFIG = 'configs/gem/gem-retinanet_effnet-lite0_demo.py'
#: What the table must reach.
MEAN_AP50, LEAST_AP50 = 0.5, 0.3
#: Images shown per domain (an even number), how much enlarged, and which detections.
SHOWN, ENLARGED, SHOWN_SCORE = 4, 3, 0.3


# --------------------------------------------------------------------------------------------------
# Table and pictures
# --------------------------------------------------------------------------------------------------


def make_table(metrics: dict[str, float], domains: dict, plan: dict) -> tuple[list[dict], str]:
    """Rows as data and as text, one per domain and one for the mean.

    Args:
        metrics: ``'<domain>/coco/bbox_mAP_50'`` and so on.
        domains: Of ``domains.json``: name -> sizes and classes.
        plan: The plan file's content.
    """
    # A metric that does not exist is null in the file.
    metrics = {key: float('nan') if value is None else value for key, value in metrics.items()}
    rows = []
    for name, made in domains.items():
        rows.append(
            {
                'domain': name,
                'train': made['train'],
                'classes': len(made['classes']),
                'experts': ' '.join(plan['assignment'][name]),
                'AP': metrics[f'{name}/coco/bbox_mAP'],
                'AP50': metrics[f'{name}/coco/bbox_mAP_50'],
            }
        )
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ('AP', 'AP50')}
    rows.append({'domain': 'mean', 'train': '', 'classes': '', 'experts': '', **mean})
    line = '{domain:<12}{train:>6}{classes:>9}  {experts:<10}{AP:>7}{AP50:>7}'
    text = [line.format(**{key: key for key in rows[0]})]
    for row in rows:
        text.append(line.format(**{**row, 'AP': f'{row["AP"]:.3f}', 'AP50': f'{row["AP50"]:.3f}'}))
    text[-1:] = ['-' * len(text[0]), text[-1]]
    return rows, '\n'.join(text)


def verdict(rows: list[dict]) -> str | None:
    """What the table misses of the demo's promise, None if it keeps it."""
    *domains, mean = rows
    missed = [
        f'{row["domain"]} {row["AP50"]:.3f} < {LEAST_AP50}'
        for row in domains
        if not row['AP50'] >= LEAST_AP50
    ]
    if not mean['AP50'] >= MEAN_AP50:
        missed.append(f'mean {mean["AP50"]:.3f} < {MEAN_AP50}')
    return 'AP50 too low: ' + ', '.join(missed) if missed else None


def draw_pictures(config: Path, checkpoint: Path, out: Path, log: Path) -> None:
    """One picture per domain: validation images in pairs, the truth left, the detections right.

    Args:
        config: Of the model and its data.
        checkpoint: Of the trained model.
        out: Folder for ``<domain>.png``.
        log: File for what the libraries say.
    """
    with log.open('a') as sink, contextlib.redirect_stdout(sink):
        _draw_pictures(config, checkpoint, out)


def _draw_pictures(config: Path, checkpoint: Path, out: Path) -> None:
    import mmcv
    import numpy as np
    import torch
    from mmdet.apis import init_detector
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    from mmdet_moe.registry import DATASETS

    cfg = Config.fromfile(config)
    model = init_detector(cfg, str(checkpoint), device='cpu')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    visualizer = DetLocalVisualizer(name=str(out))
    visualizer.dataset_meta = dataset.metainfo
    wanted: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        shown = wanted.setdefault(dataset.domain_of(index), [])
        if len(shown) < SHOWN:
            shown.append(index)
    out.mkdir(parents=True, exist_ok=True)
    for domain, indices in wanted.items():
        pairs = []
        for index in indices:
            data = dataset[index]
            with torch.no_grad():
                (found,) = model.test_step(
                    {'inputs': [data['inputs']], 'data_samples': [data['data_samples']]}
                )
            truth = dataset.get_data_info(index)['instances']
            # The images are small: only enlarged can the class names be read.
            pair = DetDataSample(
                gt_instances=InstanceData(
                    bboxes=ENLARGED * torch.tensor([one['bbox'] for one in truth]).float(),
                    labels=torch.tensor([one['bbox_label'] for one in truth]),
                ),
                pred_instances=InstanceData(
                    bboxes=ENLARGED * found.pred_instances.bboxes,
                    labels=found.pred_instances.labels,
                    scores=found.pred_instances.scores,
                ),
            )
            image = mmcv.imread(found.img_path, channel_order='rgb')
            image = mmcv.imrescale(image, float(ENLARGED))
            visualizer.add_datasample(domain, image, pair, pred_score_thr=SHOWN_SCORE)
            pairs.append(visualizer.get_image())
        rows = [np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, len(pairs) - 1, 2)]
        # imwrite wants BGR.
        mmcv.imwrite(np.concatenate(rows)[..., ::-1], str(out / f'{domain}.png'))


# --------------------------------------------------------------------------------------------------
# The job
# --------------------------------------------------------------------------------------------------


def run_demo(out: Path, seed: int) -> int:
    """All steps; the exit code."""
    data, plan = out / 'data', out / 'plan.json'
    env = {'MMDET_MOE_DEMO_DATA': f'{data}/', 'DEMO_PLAN': str(plan)}
    env |= {'OMP_NUM_THREADS': job.threads(), **job.devices()}
    os.environ.update(env)
    steps = job.Steps(out, f'{job.source_digest()} {sys.version_info[:2]} {seed}', env)

    arguments = ['tools/make_domains.py', '--out', str(data), '--seed', str(seed), '--overwrite']
    steps.step(
        'domains',
        '1/5 make domains: six looks, six label spaces',
        lambda _: steps.run(*arguments, show=job.everything),
        (ROOT / 'tools' / 'make_domains.py').read_text(),
        [data / 'domains.json'],
    )
    steps.step(
        'plan',
        '2/5 plan: which expert serves which domain',
        lambda _: steps.run(
            'tools/plan_experts.py', CONFIG, '--out', str(plan), show=job.everything
        ),
        '',
        [plan],
    )
    what = '3/5 train: one GEM-RetinaNet on all domains'
    checkpoint = job.train(steps, what, CONFIG, out / 'gem', seed)
    metrics = job.test(steps, '4/5 test, each domain by itself', CONFIG, checkpoint, out / 'test')
    domains = json.loads((data / 'domains.json').read_text())['domains']
    steps.step(
        'pictures',
        '5/5 pictures: truth left, detections right',
        lambda _: draw_pictures(ROOT / CONFIG, checkpoint, out / 'pictures', steps.log),
        '',
        [out / 'pictures' / f'{name}.png' for name in domains],
    )

    rows, text = make_table(metrics, domains, json.loads(plan.read_text()))
    job.write_json(out / 'results.json', rows)
    print(f'\n{text}\n')
    print(f'plan      {plan}\npictures  {out / "pictures"}\nmodel     {checkpoint}')
    missed = verdict(rows)
    if missed:
        print(f'demo: {missed}', file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='work_dirs/demo', help='default: work_dirs/demo')
    parser.add_argument('--seed', type=int, default=0, help='of data and training (default: 0)')
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    return job.call('demo', lambda: run_demo(out, args.seed), out)


if __name__ == '__main__':
    sys.exit(main())
