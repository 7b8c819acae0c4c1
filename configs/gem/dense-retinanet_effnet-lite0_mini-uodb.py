# The dense twin: one RetinaNet for all domains, every weight shared.
_base_ = [
    '../_base_/models/retinanet_effnet-lite0.py',
    '../_base_/datasets/mini_uodb.py',
    '../_base_/schedules/mini_uodb.py',
    '../_base_/default_runtime.py',
]
model = dict(label_space={{_base_.label_space}})
