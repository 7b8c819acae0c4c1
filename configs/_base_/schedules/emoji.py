# The 150 epochs of cnn_moe_150e.py in small: the learning rate falls after 8/15 and 12/15 of them.
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3))
max_epochs = 25  # 4 minutes on one core
param_scheduler = dict(
    type='MultiStepLR',
    by_epoch=True,
    milestones=[max_epochs * 8 // 15, max_epochs * 12 // 15],
    gamma=0.1,
)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=5)
val_cfg = {}
test_cfg = {}
auto_scale_lr = dict(base_batch_size=64)
