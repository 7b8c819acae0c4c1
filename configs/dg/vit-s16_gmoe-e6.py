# GMoE-S/16 whose step 0 is the pretrained network: the top-1 weight is 1 and nothing is dropped.
import importlib

_base_ = ['./vit-s16_dense.py', '../_base_/vit_moe.py']
model = dict(
    backbone=dict(drop_path_rate=0.1),
    moe=[dict(blocks='last_two', **_base_.gmoe)],
)
# As published, by data set.
optim_wrapper = dict(
    optimizer=importlib.import_module('mmdet_moe.datasets.dg_catalog').recipe(
        'gmoe', '{{$DG_DATASET:PACS}}'
    )
)
