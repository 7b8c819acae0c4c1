# Adapters in the small ViT of the emoji experiments, 160 wide.
_base_ = './moa.py'
small = dict(size=32, terms=32)  # of the Kronecker factors; 64 does not divide 160
lora_moa = dict(router=dict(projection=64))
kadaptation_moa = dict(adapters=small, router=dict(projection=64))
kadaptation = dict(adapters=small)
adapter_lr = 3e-3
