# SF-MoE as the code of v2 has it: blocks 6 and 12 are sparse.
import importlib

_base_ = ['./vit-s16_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='FFFFFS*2', **_base_.sf_moe)])
# As published, by data set.
optim_wrapper = dict(
    optimizer=importlib.import_module('mmdet_moe.datasets.dg_catalog').recipe(
        'sf_moe', '{{$DG_DATASET:PACS}}'
    )
)
