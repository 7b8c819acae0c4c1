# arXiv 2204.10598: Adam, batch 128, the learning rate falls tenfold after epochs 80 and 120.
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[80, 120], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=150, val_interval=1)
val_cfg = {}
test_cfg = {}
auto_scale_lr = dict(base_batch_size=128)
