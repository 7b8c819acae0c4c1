# KAdaptation-MoA: four KAdaptation adapters of ranks 1, 2, 4, 8 beside the qkv layers of blocks 1, 3, 5 of a
# frozen network that was trained on the same styles (load_from); 160 channels are 32 times 5.
_base_ = ['./vit_effnet-lite0_full_emoji.py', '../_base_/moa.py']
spec = {
    **_base_.kadaptation_moa,
    'adapters': {**_base_.kadaptation_moa['adapters'], 'size': 32, 'terms': 32},
}
model = dict(moe=[spec], freeze_others=_base_.head_only)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
