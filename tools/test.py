"""Test a detector per domain. The arguments are those of mmdet's ``tools/test.py``, and two more:

    python tools/test.py CONFIG CHECKPOINT [--out-json metrics.json] [--out predictions.pkl]

``--out-json`` writes what ``tools/analysis_tools/compare_runs.py`` reads::

    {"config": "...", "checkpoint": "...", "seed": 0, "iter": 1000,
     "small": ["cheetah"],
     "metrics": {"bccd/coco/bbox_mAP": 0.54, ..., "macro/coco/bbox_mAP": 0.29}}

``--both-readings`` adds ``bccd/unrestricted/coco/bbox_mAP`` and so on: where the classes of all
domains compete.
``--domains`` tests some of the domains only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, uninstalled

# Before any config is read: with it, `_base_ = 'mmdet_moe::...'` means the shipped configs.
import mmdet_moe  # noqa: F401  isort: skip
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_moe.planning.checks import write_atomically


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model and its test data')
    parser.add_argument('checkpoint', help='what to test')
    parser.add_argument('--both-readings', action='store_true', help='scores on all classes, too')
    parser.add_argument('--work-dir', help='folder for the log')
    parser.add_argument('--out-json', metavar='FILE', help='write the metrics there')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions there')
    parser.add_argument('--domains', nargs='+', metavar='NAME', help='test these domains only')
    parser.add_argument('--show', action='store_true', help='show detections')
    parser.add_argument('--show-dir', help='folder below the log for pictures of detections')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds each is shown')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change the config'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # Two spellings: older and newer torch.distributed.launch.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args(argv)
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def read_config(args: argparse.Namespace) -> Config:
    """The config with the command line's changes."""
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        hook = cfg.default_hooks.visualization
        hook.update(draw=True, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            hook.test_out_dir = args.show_dir
    if args.both_readings:
        if args.tta:
            raise ValueError('--both-readings: augmented tests merge one reading only')
        cfg.model.both_readings = True
    if args.domains is not None:
        choose_domains(cfg, args.domains)
    if args.tta:
        use_tta(cfg)
    return cfg


def choose_domains(cfg: Config, names: list[str]) -> None:
    """Leave the test data and metrics of the other domains out.

    Raises:
        SystemExit: The test data have no domain of that name.
    """
    dataset = cfg.test_dataloader.dataset
    while 'domains' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    known = list(dataset.get('domains', ()))
    for name in names:
        if name not in known:
            sys.exit(f'test: --domains: {name!r} is none of the tested domains {known}')
    for section in (dataset.domains, cfg.test_evaluator.metrics):
        for name in [name for name in section if name not in names]:
            del section[name]


def use_tta(cfg: Config) -> None:
    """Test with the tta_model and tta_pipeline of the config, or, where it has none, with flips."""
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    pipelines = dataset.get('domain_pipelines') or {}
    if 'tta_pipeline' in cfg:
        pipelines = dict.fromkeys(pipelines, cfg.tta_pipeline)
    else:
        cfg.tta_pipeline = with_flips(dataset.pipeline)
        pipelines = {name: with_flips(pipeline) for name, pipeline in pipelines.items()}
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline
    if pipelines:
        dataset.domain_pipelines = pipelines


def with_flips(pipeline: list) -> list:
    """A test pipeline that ends in both an image and its mirror image."""
    *loading, packing = copy.deepcopy(pipeline)
    packing.meta_keys = (*packing.get('meta_keys', ()), 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    return [*loading, dict(type='TestTimeAug', transforms=[flips, [packing]])]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = read_config(args)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out_json is not None and runner.rank == 0:
        meta = CheckpointLoader.load_checkpoint(args.checkpoint, map_location='cpu').get('meta', {})
        # JSON knows no nan: a value that does not exist is null.
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        report = {
            'config': os.path.abspath(args.config),
            'checkpoint': os.path.abspath(args.checkpoint),
            'seed': meta.get('seed'),
            'iter': meta.get('iter'),
            'small': list(getattr(runner.test_evaluator, 'small_domains', None) or ()),
            'metrics': clean,
        }
        write_atomically(args.out_json, json.dumps(report, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
