# One KAdaptation adapter beside the qkv layers of blocks 1, 3, 5.
_base_ = ['./vit_effnet-lite0_dense_emoji.py', '../_base_/moa_emoji.py']
load_from = _base_.pretrained
model = dict(moe=[_base_.kadaptation], freeze_others=_base_.head_only)
custom_hooks = [*_base_.custom_hooks, _base_.adapter_hook]
