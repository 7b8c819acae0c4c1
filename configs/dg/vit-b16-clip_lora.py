# One LoRA adapter of rank 2 beside each qkv layer of blocks 1, 3, ..., 11.
_base_ = ['./vit-b16-clip_full.py', '../_base_/moa.py']
model = dict(moe=[_base_.lora], freeze_others=_base_.head_only)
custom_hooks = [*_base_.custom_hooks, _base_.adapter_hook]
