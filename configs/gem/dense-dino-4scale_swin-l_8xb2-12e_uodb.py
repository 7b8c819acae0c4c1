# The dense twin on UODB with Swin-L in the place of ResNet-50.
_base_ = ['./dense-dino-4scale_r50_8xb2-12e_uodb.py', '../_base_/models/swin-l.py']
model = dict(
    backbone={**_base_.swin_l, '_delete_': True},
    neck=dict(in_channels=_base_.swin_l_channels),
)
