# Full fine-tuning of a dense network that was trained on the same styles (load_from).
_base_ = './vit_effnet-lite0_dense_emoji.py'
train_cfg = dict(max_iters=100, val_interval=25)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
default_hooks = dict(checkpoint=dict(interval=100))
