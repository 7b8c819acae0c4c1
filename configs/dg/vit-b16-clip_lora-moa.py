# Four LoRA adapters of ranks 1, 2, 4, 8 beside each; a cosine router sends each token to one.
_base_ = ['./vit-b16-clip_full.py', '../_base_/moa.py']
model = dict(moe=[_base_.lora_moa], freeze_others=_base_.head_only)
custom_hooks = [*_base_.custom_hooks, _base_.adapter_hook]
