# Adapters in the small ViT of the emoji experiments (160 wide), from one trained on the source
# styles: $EMOJI_VIT, a checkpoint of vit_effnet-lite0_dense_emoji.py.
_base_ = './moa.py'
small = dict(size=32, terms=32)  # of the Kronecker factors; 64 does not divide 160
lora_moa = dict(router=dict(projection=64))
kadaptation_moa = dict(adapters=small, router=dict(projection=64))
kadaptation = dict(adapters=small)
pretrained = '{{$EMOJI_VIT:work_dirs/vit_effnet-lite0_dense_emoji/iter_200.pth}}'
adapter_lr = 3e-3
