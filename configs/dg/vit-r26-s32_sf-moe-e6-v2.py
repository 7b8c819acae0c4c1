# SF-MoE in the ViT of the hybrid, blocks as the code of v2 has them: 6 and 12.
import importlib

_base_ = ['./vit-r26-s32_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='FFFFFS*2', **_base_.sf_moe)])
# As published, by data set.
optim_wrapper = dict(
    optimizer=importlib.import_module('mmdet_moe.datasets.dg_catalog').recipe(
        'sf_moe', '{{$DG_DATASET:PACS}}'
    )
)
