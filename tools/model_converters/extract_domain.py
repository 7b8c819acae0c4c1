"""From a GEM checkpoint a plain mmdet detector for one domain.

    python tools/model_converters/extract_domain.py CONFIG CHECKPOINT DOMAIN --out DIR

writes ``DIR/<domain>.py`` and ``DIR/<domain>.pth``, which mmdet loads without this package::

    python mmdetection/tools/test.py DIR/bccd.py DIR/bccd.pth

The domain's expert is the dense module again, class rows are the domain's alone, and detections are
those of the GEM model with the domain given, up to rounding. What has no exact dense twin is
refused with the reason: learned routers, two mixed experts that are neither linear nor FFNs, narrow
experts, a backbone that stock mmdet, mmpretrain and timm do not have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pickle import UnpicklingError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled

# Before any config is read: with it, `_base_ = 'mmdet_moe::...'` means the shipped configs.
import mmdet_moe  # noqa: F401  isort: skip
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import import_modules_from_strings

from mmdet_moe.models.checkpoint import checkpoint_weights, save_tensors
from mmdet_moe.models.extract import extract_domain
from mmdet_moe.planning.checks import write_atomically


def load(path: str) -> dict:
    """A checkpoint.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f'cannot read the checkpoint {path}: {error}') from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the GEM detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('domain', help='the domain to extract')
    parser.add_argument('--out', type=Path, required=True, help='folder for config and checkpoint')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change the config'
    )
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.get('default_scope', 'mmdet_moe'))
    try:
        checkpoint = load(args.checkpoint)
        plain, state, classes = extract_domain(cfg, checkpoint_weights(checkpoint), args.domain)
    except ValueError as error:
        print(f'extract_domain: {error}', file=sys.stderr)
        return 2
    weights, config = args.out / f'{args.domain}.pth', args.out / f'{args.domain}.py'
    meta = dict(dataset_meta=dict(classes=classes))
    save_tensors(weights, dict(state_dict=state, meta=meta))
    write_atomically(config, plain.pretty_text)
    size = sum(value.numel() for value in state.values())
    print(f'{config}\n{weights}: {size / 1e6:.2f} M numbers, classes {", ".join(classes)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
