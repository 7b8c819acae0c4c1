"""Merge single adapters into the linear layers they stand beside.

    python tools/model_converters/merge_adapters.py CONFIG CHECKPOINT OUT [--base PRETRAINED]

OUT is a checkpoint of the stock mmpretrain model: the same network without adapters, which computes
the same. A mixture, whose router sends each token elsewhere, is no one matrix and cannot be merged.

CHECKPOINT: whole, or of adapters alone; then the pretrained model comes from ``--base``, or from
the config's ``init_cfg``. Exit 2 and one line if it is not that config's, or cannot be done.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from extract_adapters import convert

from mmdet_moe.moe import merged_state_dict

if __name__ == '__main__':
    description = __doc__.split('\n')[0]
    sys.exit(convert('merge_adapters', description, lambda m: {'state_dict': merged_state_dict(m)}))
