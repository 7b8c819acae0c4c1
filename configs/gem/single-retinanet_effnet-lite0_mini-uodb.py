# One dense RetinaNet for one domain alone, chosen by $SINGLE_DOMAIN: what sharing has to beat. It
# has the dense twin's steps divided by the number of domains, and keeps its label space
# (other classes are masked), so its checkpoint fits the other models'.
_base_ = './dense-retinanet_effnet-lite0_mini-uodb.py'
domain = '{{$SINGLE_DOMAIN:bccd}}'

_domains = len(_base_.train_domains)
train_dataloader = dict(
    dataset=dict(domains=dict(_delete_=True, **{domain: _base_.train_domains[domain]}))
)
val_dataloader = dict(
    dataset=dict(domains=dict(_delete_=True, **{domain: _base_.test_domains[domain]}))
)
test_dataloader = val_dataloader
val_evaluator = dict(metrics=dict(_delete_=True, **{domain: _base_.metrics[domain]}))
test_evaluator = val_evaluator

_iters = _base_.train_cfg.max_iters // _domains
_warmup = _base_.param_scheduler[0].end // _domains
train_cfg = dict(max_iters=_iters, val_interval=_iters)
param_scheduler = [
    {**_base_.param_scheduler[0], 'end': _warmup},
    {**_base_.param_scheduler[1], 'begin': _warmup, 'end': _iters, 'T_max': _iters - _warmup},
]
del _domains, _iters, _warmup
