"""A plain mmdet detector for one domain, out of a GEM detector of many.

One model to train, small dense ones to ship: the domain's expert becomes the dense module that it
was copied from, class rows are cut to the domain's, and what is left is a config and a state dict
that mmdet reads without this package. Nothing is approximated: what cannot be folded exactly is
refused.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.transformer import FFN
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmdet_moe.moe import MoELayer, PlanRouter, ProbabilityMoELayer
from mmdet_moe.planning.checks import read_json
from mmdet_moe.registry import MODELS, SCOPE

from .backbones.efficientnet_lite import EfficientNetLite
from .domain_classes import MultiDomainHeadMixin
from .moe_mixin import HEADS, MoEMixin

#: Whose models the extracted detector is built from.
STOCK = ('mmdet', 'mmpretrain')
#: A stack of transformer layers, whose FFNs have one width in the config.
STACK = re.compile(r'(encoder|decoder)\.layers\.\d+\.ffn')


class ExtractionError(ValueError):
    """A model that has no exact dense twin for a domain; the message says why."""


def extract_domain(
    cfg: Mapping[str, Any], state_dict: Mapping[str, Tensor], domain: str
) -> tuple[Config, dict[str, Tensor], tuple[str, ...]]:
    """The plain detector of one domain.

    Args:
        cfg: The MoE detector's config.
        state_dict: Its weights.
        domain: One of its label space's.

    Returns:
        Config and state dict of a detector of mmdet alone, and its classes in the order of their
        labels: that of the test data's COCO json where it can be read, since it is how mmdet counts
        them, else the label space's.

    Raises:
        ExtractionError: There is no exact one.
    """
    cfg = Config(copy.deepcopy(dict(cfg)))
    # What guesses domains is of no use where there is one.
    cfg.model.pop('domain_features', None)
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith('domain_features.')}
    with DefaultScope.overwrite_default_scope(SCOPE):
        model = MODELS.build(copy.deepcopy(cfg.model))
    if not isinstance(model, MoEMixin) or model.label_space is None:
        raise ExtractionError('the config is no detector of several domains (label_space)')
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        why = ' '.join(str(error).split())
        raise ExtractionError(f'the checkpoint is not of this config: {why[:300]}') from None
    model.eval()
    model.label_space.check_domain(domain)
    widths: dict[str, int] = {}
    state = _folded(model, domain, widths)
    classes = _as_counted(cfg, domain, model.label_space.local_classes(domain))
    state = _cut_rows(model, state, domain, classes)
    plain = _plain_model(cfg.model, model, len(classes), widths)
    state = _renamed(model, plain, state)
    return _plain_config(cfg, plain, domain, classes), state, tuple(classes)


# -- experts -------------------------------------------------------------------------------------


def _folded(model: MoEMixin, domain: str, widths: dict[str, int]) -> dict[str, Tensor]:
    """The model's weights with the domain's dense modules in the places of its MoE layers.

    ``widths`` gets the FFN width of each stack that had to be widened.
    """
    layers = model.moe_layers()
    inside = tuple(f'{name}.{child}.' for name, x in layers.items() for child in x.own_children)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
    for name, layer in layers.items():
        modules = _modules_of(name, layer, domain)
        if len(modules) == 1:
            folded = modules[0][0].state_dict()
        elif isinstance(layer, ProbabilityMoELayer):
            raise ExtractionError(
                f'{name}: the domain mixes {len(modules)} experts as probabilities, and the logit '
                "of a mixture is no sum of logits; only mix='logit' folds, or one expert"
            )
        elif all(isinstance(module, FFN) for module, _ in modules):
            folded = _joined_ffn(name, modules)
            match = STACK.fullmatch(name)
            if match is None:
                raise ExtractionError(
                    f'{name}: two mixed FFNs fold into a wider one, but where the config says the '
                    'width is known of encoder and decoder layers only'
                )
            hidden = folded['layers.0.0.weight'].shape[0]
            widths[match[1]] = max(widths.get(match[1], 0), hidden)
        else:
            folded = _mean_of_linear(name, modules)
        state.update({f'{name}.{key}': value for key, value in folded.items()})
    for stack, width in widths.items():
        _widen(state, stack, width)
    return state


def _modules_of(name: str, layer: MoELayer, domain: str) -> list[tuple[nn.Module, float]]:
    """The modules whose weighted sum is what the layer computes for the domain."""
    router = layer.router
    if not isinstance(router, PlanRouter):
        raise ExtractionError(
            f'{name}: a {type(router).__name__} chooses experts by what it sees, so no expert is '
            f"{domain!r}'s; only layers with a PlanRouter can be extracted"
        )
    if domain not in router.datasets:
        raise ExtractionError(f'{name}: {router.source} has no experts for {domain!r}')
    if layer.bypass is not None or layer.patches is not None or layer.altered:
        what = layer.altered or ('it has a bypass' if layer.bypass is not None else 'it cuts maps')
        raise ExtractionError(
            f'{name}: {what}, so its expert is no {layer.dense_type} in the dense model'
        )
    routed = 1.0 - (layer.shared_weight if len(layer.shared) else 0.0)
    weights = router.assignment()[domain]
    found = [
        (layer.experts[router.experts.index(expert)], routed * weight)
        for expert, weight in weights.items()
    ]
    found += [(module, layer.shared_weight / len(layer.shared)) for module in layer.shared]
    return found


def _mean_of_linear(name: str, modules: Sequence[tuple[nn.Module, float]]) -> dict[str, Tensor]:
    """A weighted sum of linear maps is the linear map of the weighted sums."""
    if not all(_is_linear(module) for module, _ in modules):
        kind = type(modules[0][0]).__name__
        raise ExtractionError(
            f'{name}: the domain mixes {len(modules)} experts, and a weighted sum of several '
            f'{kind} is no {kind}; only linear layers and FFNs fold. Give it one expert in the plan'
        )
    total = {}
    for key, first in modules[0][0].state_dict().items():
        parts = [weight * module.state_dict()[key].double() for module, weight in modules]
        total[key] = torch.stack(parts).sum(0).to(first.dtype)
    return total


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, ConvModule):
        return not module.with_norm and not module.with_activation
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _joined_ffn(name: str, modules: Sequence[tuple[Any, float]]) -> dict[str, Tensor]:
    r"""FFNs side by side: :math:`\sum_e w_e (V_e a(U_e x + b_e) + c_e)` is one FFN whose hidden
    units are all of theirs, with :math:`w_e V_e` behind them; layers between are block-diagonal."""
    if not all(isinstance(module.gamma2, nn.Identity) for module, _ in modules):
        raise ExtractionError(f'{name}: FFNs with a layer scale each do not fold into one')
    states = [module.state_dict() for module, _ in modules]
    weights = [weight for _, weight in modules]
    last = modules[0][0].num_fcs - 1
    joined = {}
    for key in states[0]:
        parts = [state[key] for state in states]
        if key.startswith(f'layers.{last}.'):
            parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
            joined[key] = torch.cat(parts, 1) if parts[0].ndim == 2 else torch.stack(parts).sum(0)
        elif key.startswith('layers.0.') or parts[0].ndim == 1:
            joined[key] = torch.cat(parts)
        else:
            joined[key] = torch.block_diag(*parts)
    return joined


def _widen(state: dict[str, Tensor], stack: str, width: int) -> None:
    """Fill the FFNs of a stack up to ``width`` hidden units with zeros, which give nothing."""
    names = {STACK.match(key)[0] for key in state if STACK.match(key) and key.startswith(stack)}  # type: ignore[index]
    for name in names:
        prefix = f'{name}.layers.'
        keys = [key for key in state if key.startswith(prefix)]
        last = max(int(key[len(prefix) :].partition('.')[0]) for key in keys)
        for key in keys:
            index = int(key[len(prefix) :].partition('.')[0])
            value = state[key]
            rows = 0 if index == last else width - value.shape[0]
            columns = width - value.shape[1] if value.ndim == 2 and index else 0
            pad = (0, columns, 0, rows) if value.ndim == 2 else (0, rows)
            state[key] = nn.functional.pad(value, pad)


# -- class rows ----------------------------------------------------------------------------------


def _as_counted(cfg: Config, domain: str, classes: Sequence[str]) -> Sequence[str]:
    """The classes as the domain's test data count them: mmdet goes by the order in a COCO json,
    whatever ``metainfo['classes']`` says."""
    data = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    dataset = data.get('domains', {}).get(domain) or {}
    path = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    if path.suffix != '.json' or not path.is_file():
        return classes
    names = [category['name'] for category in read_json(path, 'COCO json')['categories']]
    return sorted(classes, key=names.index) if set(classes) <= set(names) else classes


def _cut_rows(
    model: MoEMixin, state: dict[str, Tensor], domain: str, classes: Sequence[str]
) -> dict[str, Tensor]:
    """The state dict with the rows of the domain's ``classes`` alone, in their order."""
    space = model.label_space
    assert space is not None
    wanted = [space.unified_name(domain, name) for name in classes]
    rows = model.class_rows()
    blocks = {p: names for p, names in rows.items() if '.newcomers' in p}
    cut = dict(state)
    for key, value in state.items():
        module, _, part = key.rpartition('.')
        owner = next((p for p in rows if p not in blocks and re.fullmatch(p, module)), None)
        if owner is None:
            if any(re.fullmatch(pattern, module) for pattern in blocks):
                del cut[key]
            continue
        found = _by_name(value, rows[owner])
        for pattern, names in blocks.items():
            for other in [k for k in state if k.startswith(f'{module}.newcomers.')]:
                inner, _, same = other.rpartition('.')
                if same == part and re.fullmatch(pattern, inner):
                    found.update(_by_name(state[other], names))
        order: list[str | None] = [*wanted, *[n for n in rows[owner] if n is None]]
        cut[key] = torch.stack([found[name] for name in order], 1).flatten(0, 1)
    return cut


def _by_name(value: Tensor, names: Sequence[str | None]) -> dict[str | None, Tensor]:
    """Class -> its rows, one per anchor, each has shape (A, ...)."""
    parts = value.unflatten(0, (-1, len(names))).unbind(1)
    return dict(zip(names, parts, strict=True))


# -- the config ----------------------------------------------------------------------------------


def _plain_model(
    cfg: Mapping[str, Any], model: MoEMixin, num_classes: int, widths: Mapping[str, int]
) -> dict[str, Any]:
    """The config of mmdet's own detector."""
    plain = _without_options(Config(dict(cfg)).to_dict(), type(model))
    plain['_scope_'] = 'mmdet'
    for key in HEADS:
        head = getattr(model, key, None)
        if isinstance(head, MultiDomainHeadMixin):
            plain[key] = {
                **_without_options(plain[key], type(head)),
                'num_classes': num_classes,
            }
    for stack, width in widths.items():
        layer = plain[stack]['layer_cfg']
        layer['ffn_cfg'] = {**layer.get('ffn_cfg', {}), 'feedforward_channels': width}
    queries = plain.get('num_queries')
    if queries is not None and plain.get('test_cfg'):
        most = plain['test_cfg'].get('max_per_img', queries)
        plain['test_cfg']['max_per_img'] = min(most, queries * num_classes)
    backbone = model.backbone
    if isinstance(backbone, EfficientNetLite):
        plain['backbone'] = _timm_backbone(backbone)
    elif type(backbone).__module__.startswith('mmdet_moe.'):
        raise ExtractionError(
            f'backbone: a {type(backbone).__name__} is not in stock mmdet, and nothing there '
            'computes the same'
        )
    plain['backbone'].pop('init_cfg', None)  # its weights are in the checkpoint
    # Their parts have other names in stock mmdet, and no module around them.
    subnets = [
        f'{key}.{place.partition(".")[0]}'
        for key in HEADS
        for place in getattr(getattr(model, key, None), 'places', {}).values()
    ]
    for name, module in model.named_modules():
        inner = any(name == x or name.startswith(f'{x}.') for x in ('backbone', *model.moe_names))
        if name and not inner and name not in subnets and not _replaceable(module):
            raise ExtractionError(f'{name}: a {type(module).__name__} is not in stock mmdet')
    return plain


def _replaceable(module: nn.Module) -> bool:
    """Whether the module is stock mmdet's or torch's but for what extraction takes away."""
    base = next(k for k in type(module).__mro__ if not k.__module__.startswith('mmdet_moe.'))
    return type(module) is base or base not in (nn.Module, BaseModule)


def _sets_domain(step: Mapping[str, Any]) -> bool:
    """Whether a step of a pipeline only says the domain, which a plain detector does not ask."""
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).split('.')[-1] == 'SetDomain'


def _without_scope(cfg: Any) -> Any:
    """A config without the scope that a base called ``mmdet_moe::`` writes into each dict."""
    if isinstance(cfg, Mapping):
        kept = {k: v for k, v in cfg.items() if (k, v) != ('_scope_', SCOPE)}
        return {key: _without_scope(value) for key, value in kept.items()}
    return type(cfg)(map(_without_scope, cfg)) if isinstance(cfg, (list, tuple)) else cfg


def _without_options(cfg: dict[str, Any], kind: type) -> dict[str, Any]:
    """A module's config as the stock class's that ours builds on: our options gone."""
    cfg = {key: value for key, value in cfg.items() if key != '_scope_'}
    for base in kind.__mro__:
        if base.__module__.startswith(STOCK) and not base.__module__.startswith('mmdet_moe'):
            return {**cfg, 'type': f'{base.__module__.partition(".")[0]}.{base.__name__}'}
        if '__init__' in vars(base):
            own = inspect.signature(base.__init__).parameters  # type: ignore[misc]
            kept = ('dn_cfg', 'num_classes')
            cfg = {key: value for key, value in cfg.items() if key not in own or key in kept}
    raise ExtractionError(f'{kind.__name__} does not build on a class of mmdet')


def _timm_backbone(backbone: EfficientNetLite) -> dict[str, Any]:
    """timm's twin of our EfficientNet-Lite, which has the same layers and the same padding."""
    if backbone.has_head:
        raise ExtractionError("backbone: timm's features have no level 5 (the head convolution)")
    if len(backbone.stages) < backbone.num_stages:
        raise ExtractionError(
            f'backbone: ours ends with stage {len(backbone.stages) - 1}, the last of out_indices; '
            f"timm's twin has stage {backbone.num_stages - 1} too, and no weights for it"
        )
    return dict(
        type='mmpretrain.TIMMBackbone',
        model_name=f'tf_efficientnet_{backbone.arch}',
        features_only=True,
        out_indices=tuple(backbone.out_indices),
    )


def _renamed(
    model: MoEMixin, plain: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights by the names of the stock modules."""
    renamed = dict(state)
    for key in HEADS:
        head = getattr(model, key, None)
        for stock, ours in getattr(head, 'places', {}).items():
            for name in [name for name in renamed if name.startswith(f'{key}.{ours}.')]:
                rest = name[len(f'{key}.{ours}.') :]
                renamed[f'{key}.{stock}.{rest}'] = renamed.pop(name)
    if isinstance(model.backbone, EfficientNetLite):
        names = model.backbone.timm_names()
        for name in [name for name in renamed if name.startswith('backbone.')]:
            module, _, part = name.removeprefix('backbone.').rpartition('.')
            renamed[f'backbone.timm_model.{names[module]}.{part}'] = renamed.pop(name)
    return renamed


def _plain_config(
    cfg: Config, model: dict[str, Any], domain: str, classes: Sequence[str]
) -> Config:
    """What mmdet's ``tools/test.py`` and ``init_detector`` need."""
    plain: dict[str, Any] = dict(default_scope='mmdet', model=model)
    if 'mmpretrain.' in str(model):
        imports = ['mmpretrain.models']
        plain['custom_imports'] = dict(imports=imports, allow_failed_imports=False)
    loader = cfg.get('test_dataloader')
    if loader is not None and domain in loader['dataset'].get('domains', {}):
        loader = loader.to_dict()
        data = loader['dataset']
        dataset = data['domains'][domain]
        own = dataset.get('pipeline') or (data.get('domain_pipelines') or {}).get(domain)
        dataset.update(
            pipeline=[step for step in own or data['pipeline'] if not _sets_domain(step)],
            metainfo=dict(classes=tuple(classes)),
            test_mode=True,
        )
        plain.update(
            test_dataloader={**loader, 'dataset': dataset},
            test_cfg=dict(type='TestLoop'),
        )
        metrics = (cfg.get('test_evaluator') or {}).get('metrics') or {}
        if domain in metrics:
            plain['test_evaluator'] = Config(dict(x=metrics[domain])).to_dict()['x']
    return Config(_without_scope(plain))
