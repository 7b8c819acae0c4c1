# Four KAdaptation adapters beside the qkv layers of blocks 1, 3, 5, one per token.
_base_ = ['./vit_effnet-lite0_full_emoji.py', '../_base_/moa_emoji.py']
load_from = _base_.pretrained
model = dict(moe=[_base_.kadaptation_moa], freeze_others=_base_.head_only)
optim_wrapper = dict(optimizer=dict(lr=_base_.adapter_lr))
