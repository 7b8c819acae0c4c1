"""What the process that jobs are forked from imports: nothing that starts threads or CUDA."""

import mmpretrain.apis
import mmpretrain.datasets
import mmpretrain.models  # noqa: F401

import mmdet_moe.datasets
import mmdet_moe.engine
import mmdet_moe.evaluation
import mmdet_moe.models  # noqa: F401
