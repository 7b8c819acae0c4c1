"""Detect objects in images and draw them; as mmdet's image demo, with a domain.

    python tools/image_demo.py IMAGE_OR_FOLDER CONFIG --weights CKPT [--domain NAME] [--out-dir DIR]

Without ``--domain`` an image is routed by its embedding, to the domain whose images are nearest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, uninstalled


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('inputs', help='image file or folder of images')
    parser.add_argument('model', help='config of the model')
    parser.add_argument('--weights', required=True, help='checkpoint')
    parser.add_argument('--domain', help='the domain of the images (default: the nearest)')
    parser.add_argument('--out-dir', default='outputs', help='folder for pictures and predictions')
    parser.add_argument('--device', help='device (default: cuda where there is one)')
    parser.add_argument('--pred-score-thr', type=float, default=0.3, help='least score to draw')
    parser.add_argument('--batch-size', type=int, default=1, help='images at once')
    parser.add_argument('--no-save-pred', action='store_true', help='do not write predictions')
    args = parser.parse_args(argv)

    import mmdet_moe  # noqa: F401 - before any config is read
    from mmdet_moe.models.inferencer import MultiDomainInferencer

    inferencer = MultiDomainInferencer(
        args.model, args.weights, device=args.device, domain=args.domain
    )
    inferencer(
        args.inputs,
        batch_size=args.batch_size,
        pred_score_thr=args.pred_score_thr,
        out_dir=args.out_dir,
        no_save_pred=args.no_save_pred,
    )
    print(f'written to {args.out_dir}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
