# Full fine-tuning of a dense network that was trained on the same styles: $EMOJI_VIT, a checkpoint
# of vit_effnet-lite0_dense_emoji.py (tools/dg_sweep.py --stage trains and gives it).
_base_ = './vit_effnet-lite0_dense_emoji.py'
load_from = '{{$EMOJI_VIT:work_dirs/vit_effnet-lite0_dense_emoji/iter_200.pth}}'
train_cfg = dict(max_iters=80, val_interval=40)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
default_hooks = dict(checkpoint=dict(interval=80))
