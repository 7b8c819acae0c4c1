# What SF-MoE and GMoE (arXiv 2206.04046, v1-v2 and v6) put into a ViT, for the specs of configs/dg.
# Which blocks are sparse, each file says itself.
sf_moe = dict(
    num_experts=6,
    router=dict(
        type='GShardRouter',  # linear, softmax, top-2; the second at random in training
        capacity_factor=1.25,
        test_capacity_factor=2.0,
        group='image',
        capacity_rule='gshard',
    ),
    balance=[dict(type='SwitchLoss', weight=0.01, group='image')],
)
gmoe = dict(
    num_experts=6,
    router=dict(
        type='CosineRouter',  # 256 wide, learned temperature, noise N(0, 1) / 6
        k=1,
        renormalize='detached',  # weight 1, with a gradient: the dense function is kept at step 0
    ),
    balance=[dict(type='ImportanceLoss', weight=0.005), dict(type='LoadLoss', weight=0.005)],
)
# As published: the FFN scaled by the top-1 probability, what is over 1.5 times the even share
# dropped, those with the largest probability served first.
gmoe_published = {
    **gmoe,
    'router': dict(
        type='CosineRouter',
        k=1,
        capacity_factor=1.5,
        test_capacity_factor=1.5,
        prioritised=True,
    ),
}
