"""CLIP's image transformer for mmpretrain's ``VisionTransformer``.

    python tools/model_converters/clip_to_mmpretrain.py SRC DST [--neck]

SRC: OpenCLIP's, OpenAI's or timm's weights, as ``.safetensors`` or a file of tensors that
``torch.load(weights_only=True)`` reads (a state dict, or one under ``state_dict``). DST: a
checkpoint for ``init_cfg=dict(type='Pretrained', checkpoint=DST, prefix='backbone.')`` of a
backbone as in configs/_base_/models/vit-base_clip_dg.py (``pre_norm=True``, norms' eps 1e-5).
``--neck`` keeps CLIP's projection, as the weights of a ``LinearNeck``.

Exit 2 and one line if there are keys it does not know, or some are missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled

from mmdet_moe.models.adapter_files import read_tensors
from mmdet_moe.models.checkpoint import save_tensors
from mmdet_moe.models.clip import clip_to_mmpretrain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('src', help="OpenCLIP's or timm's weights")
    parser.add_argument('dst', help='the checkpoint to write')
    parser.add_argument('--neck', action='store_true', help="keep CLIP's projection")
    args = parser.parse_args()
    try:
        content = read_tensors(args.src)
        converted = clip_to_mmpretrain(content.get('state_dict', content), args.neck)
    except (OSError, ValueError) as error:
        print(f'clip_to_mmpretrain: {error}', file=sys.stderr)
        return 2
    save_tensors(args.dst, {'state_dict': converted})
    numbers = sum(value.numel() for value in converted.values())
    print(f'{args.dst}: {len(converted)} tensors, {numbers:,} parameters')
    return 0


if __name__ == '__main__':
    sys.exit(main())
