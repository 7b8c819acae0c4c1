# Balanced by the hard constraint in the place of the loss.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'balance': [dict(type='RelativeImportanceConstraint', threshold=0.3)],
        }
    ]
)
