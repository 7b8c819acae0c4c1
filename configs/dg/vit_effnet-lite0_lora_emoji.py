# One LoRA adapter of rank 2 beside the qkv layers of blocks 1, 3, 5 of a frozen
# network that was trained on the same styles (load_from).
_base_ = ['./vit_effnet-lite0_full_emoji.py', '../_base_/moa.py']
model = dict(moe=[_base_.lora], freeze_others=_base_.head_only)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
