# 200 steps, evaluated every 50.
_base_ = 'dg.py'
train_cfg = dict(max_iters=200, val_interval=50)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=50))
