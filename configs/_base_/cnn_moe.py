# What the MoE layers of arXiv 2204.10598 have in common, for the specs of configs/cnn_moe.
moe_layer = dict(
    router=dict(type='TopKRouter', k=2, bias=True),  # GAP-FC, noisy top-2
    noise='independent',  # experts train from scratch, each from its own draw
)
balances = dict(
    importance=[dict(type='ImportanceLoss', weight=0.5, of='weights', unbiased=True)],
    kl=[dict(type='KLLoss', weight=0.5)],
    relative=[dict(type='RelativeImportanceConstraint', threshold=0.5)],
    mean=[dict(type='MeanImportanceConstraint', threshold=0.3)],
    none=[],
)
