"""Take the adapters, routers and the head out of a checkpoint: a few MB.

    python tools/model_converters/extract_adapters.py CONFIG CHECKPOINT OUT [--base PRETRAINED]

OUT holds tensors only (``torch.load(weights_only=True)``) and the fingerprint of the pretrained
model, onto which it loads, see docs/domain_generalization.md.

CHECKPOINT: whole, or of adapters alone; then the pretrained model comes from ``--base``, or from
the config's ``init_cfg``. Exit 2 and one line if it is not that config's, or cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled

# Before any config is read: with it, `_base_ = 'mmdet_moe::...'` means the shipped configs.
import mmdet_moe
import mmdet_moe.models  # noqa: F401 - registers the models
from mmdet_moe.models.adapter_files import model_with_adapters
from mmdet_moe.models.checkpoint import save_tensors
from mmdet_moe.moe import adapter_checkpoint


def convert(name: str, description: str, take: Callable[[nn.Module], dict[str, Any]]) -> int:
    """The command that writes what ``take`` makes of a model with adapters; its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('out', help='the checkpoint to write')
    parser.add_argument('--base', help='checkpoint of the pretrained model')
    args = parser.parse_args()
    try:
        model = model_with_adapters(args.config, args.checkpoint, args.base)
        found = take(model)
    except (OSError, ValueError) as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 2
    save_tensors(args.out, found)
    size = Path(args.out).stat().st_size / 1e6
    print(f'{args.out}: {len(found["state_dict"])} tensors, {size:.1f} MB')
    return 0


if __name__ == '__main__':
    sys.exit(convert('extract_adapters', __doc__.split('\n')[0], adapter_checkpoint))
