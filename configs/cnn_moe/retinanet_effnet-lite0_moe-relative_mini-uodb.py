# Balanced by the hard constraint in the place of the loss.
_base_ = './retinanet_effnet-lite0_moe-kl_mini-uodb.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'balance': [dict(type='RelativeImportanceConstraint', threshold=0.3)],
        }
    ]
)
