# The dense twin: one DINO for all domains, every weight shared.
_base_ = [
    '../_base_/models/dino_effnet-lite0.py',
    '../_base_/datasets/demo.py',
    '../_base_/schedules/demo.py',
    '../_base_/default_runtime.py',
]
model = dict(label_space={{_base_.label_space}})
