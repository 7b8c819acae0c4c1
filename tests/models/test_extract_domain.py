"""One domain's detector, plain: what it detects, and that stock mmdet loads it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mmpretrain.models  # noqa: F401 - registers TIMMBackbone
import pytest
import torch
from mmdet.models.necks import FPN
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from tiny_models import CONFIGS, DOMAINS, SPACE, build, images, moe_specs, sample

from mmdet_moe.models.extract import ExtractionError, extract_domain
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS

#: street mixes two experts.
MIXED = ExpertPlan.from_assignment({'street': ['e0', 'e1'], 'blood': 'e1', 'yard': 'e2'})
ONE = ExpertPlan.from_assignment({'street': 'e0', 'blood': 'e1', 'yard': 'e2'})

STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'mmdet_moe':
            raise ImportError('this process knows no ' + name)
sys.meta_path.insert(0, Refuse())
try:
    import mmdet_moe
except ImportError:
    pass
else:
    raise SystemExit('mmdet_moe was imported')
import torch
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = torch.load(folder + '/given.pth', weights_only=False)
    files = folder + '/plain.py', folder + '/plain.pth'
    model = init_detector(*files, device='cpu', palette='random')
    assert not any('mmdet_moe' in type(m).__module__ for m in model.modules())
    samples = [DetDataSample(metainfo=meta) for meta in given['metas']]
    with torch.no_grad():
        found = model.predict(given['images'], samples)
    keys = ('bboxes', 'scores', 'labels')
    found = [{k: getattr(s.pred_instances, k) for k in keys} for s in found]
    torch.save(found, folder + '/found.pth')
    print(model.dataset_meta['classes'])
"""


def spread(model):
    """Weights at which experts, classes and boxes differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if any(part in key for part in ('cls', 'reg', 'label_embedding', 'experts')):
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model.eval()


def detect(model, domain, count=2):
    samples = [sample(domain, [], []) for _ in range(count)]
    with torch.no_grad():
        return [s.pred_instances for s in model.predict(images(count), samples)]


def config_of(kind, **model):
    return Config(dict(model=dict(CONFIGS[kind](label_space=SPACE.to_dict(), **model))))


def assert_same(found, expected, domain):
    """Boxes (px) and scores within 1e-4, classes the same by name."""
    names = [SPACE.unified_name(domain, name) for name in DOMAINS[domain]]
    for one, other in zip(found, expected, strict=True):
        assert len(one['scores']) == len(other.scores) > 0
        assert torch.allclose(one['scores'], other.scores, rtol=0, atol=1e-4)
        assert torch.allclose(one['bboxes'], other.bboxes, rtol=0, atol=1e-4)
        unified = [SPACE.unified_id(names[i]) for i in one['labels']]
        assert unified == other.labels.tolist()


def plainly(plain, state):
    """The extracted detector, built in this process from mmdet's classes alone."""
    init_default_scope('mmdet')
    model = MODELS.build(ConfigDict(plain.model))
    model.load_state_dict(state, strict=True)
    assert not any(type(m).__module__.startswith('mmdet_moe') for m in model.modules())
    return model.eval()


@pytest.mark.parametrize('kind', CONFIGS)
def test_extracted_detector_detects_what_the_gem_model_detects(kind):
    specs = moe_specs(kind, ONE)
    model = spread(build(kind, moe=specs))
    cfg = config_of(
        kind, moe=[{**s, 'router': {**s['router'], 'plan': ONE.to_dict()}} for s in specs]
    )
    for domain in ('street', 'blood'):
        plain, state, classes = extract_domain(cfg, model.state_dict(), domain)
        assert classes == tuple(DOMAINS[domain])
        found = [vars_of(x) for x in detect(plainly(plain, state), domain)]
        assert_same(found, detect(model, domain), domain)


def vars_of(instances):
    return {key: getattr(instances, key) for key in ('bboxes', 'scores', 'labels')}


def test_two_mixed_ffn_experts_fold_into_a_wider_one_and_the_stack_is_widened_with_zeros():
    specs = moe_specs('dino', MIXED)
    specs[0]['targets'] = r'decoder\.layers\.0\.ffn'
    model = spread(build('dino', moe=specs))
    specs[0]['router'] = {**specs[0]['router'], 'plan': MIXED.to_dict()}
    plain, state, _ = extract_domain(config_of('dino', moe=specs), model.state_dict(), 'street')
    assert plain.model.decoder.layer_cfg.ffn_cfg.feedforward_channels == 128
    assert not state['decoder.layers.1.ffn.layers.0.0.weight'][64:].any()
    expected = detect(model, 'street')
    assert_same([vars_of(x) for x in detect(plainly(plain, state), 'street')], expected, 'street')
    # yard has one expert: nothing is widened.
    plain, _, _ = extract_domain(config_of('dino', moe=specs), model.state_dict(), 'yard')
    assert plain.model.decoder.layer_cfg.ffn_cfg.feedforward_channels == 64


def test_mixed_linear_experts_fold_and_mixed_convolutions_with_a_norm_do_not():
    linear = [dict(moe_specs('retinanet', MIXED)[0], targets=r'bbox_head\.retina_(cls|reg)')]
    model = spread(build('retinanet', moe=linear))
    linear[0]['router'] = {**linear[0]['router'], 'plan': MIXED.to_dict()}
    cfg = config_of('retinanet', moe=linear)
    plain, state, _ = extract_domain(cfg, model.state_dict(), 'street')
    expected = detect(model, 'street')
    assert_same([vars_of(x) for x in detect(plainly(plain, state), 'street')], expected, 'street')
    specs = moe_specs('retinanet', MIXED)
    model = build('retinanet', moe=specs)
    specs[0]['router'] = {**specs[0]['router'], 'plan': MIXED.to_dict()}
    cfg = config_of('retinanet', moe=specs)
    with pytest.raises(ExtractionError, match='mixes 2 experts, and a weighted sum of several'):
        extract_domain(cfg, model.state_dict(), 'street')
    assert extract_domain(cfg, model.state_dict(), 'yard')[2] == tuple(DOMAINS['yard'])


def test_learned_routers_and_bypasses_are_refused_with_the_reason():
    for extra, why in (
        (
            dict(router=dict(type='TopKRouter', k=1), num_experts=2),
            'chooses experts by what it sees',
        ),
        (dict(router=dict(type='PlanRouter', plan=ONE.to_dict()), bypass=True), 'has a bypass'),
    ):
        specs = [dict(targets=r'backbone\.layer4', **extra)]
        model = build('retinanet', moe=specs)
        with pytest.raises(ExtractionError, match=why):
            extract_domain(config_of('retinanet', moe=specs), model.state_dict(), 'street')


def test_experts_that_mix_as_probabilities_do_not_fold():
    """Of the mixture w s(a) + (1 - w) s(b), s the sigmoid, the logit is not w a + (1 - w) b."""
    router = dict(type='PlanRouter', plan=MIXED.to_dict())
    specs = [dict(targets=r'bbox_head\.cls_subnet\.output', router=router)]
    for mix in ('probability', 'logit'):
        head = dict(type='MoERetinaHead', mix=mix)
        model = spread(build('retinanet', moe=specs, head=head))
        cfg = config_of('retinanet', moe=specs, head=head)
        if mix == 'probability':
            with pytest.raises(ExtractionError, match='mixes 2 experts as probabilities'):
                extract_domain(cfg, model.state_dict(), 'street')
        domain = 'yard' if mix == 'probability' else 'street'
        plain, state, _ = extract_domain(cfg, model.state_dict(), domain)
        found = [vars_of(x) for x in detect(plainly(plain, state), domain)]
        assert_same(found, detect(model, domain), domain)


def test_what_guesses_domains_is_left_behind_and_no_scope_of_ours_is_left():
    """As in the full-size configs, and in a config that begins with a base ``mmdet_moe::``."""
    specs = moe_specs('retinanet', ONE)
    model = spread(build('retinanet', moe=specs, domain_features={}))
    specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
    cfg = config_of('retinanet', moe=specs, domain_features={})
    for part in (cfg.model.data_preprocessor, cfg.model.neck, cfg.model.train_cfg.assigner):
        part['_scope_'] = 'mmdet_moe'
    plain, state, _ = extract_domain(cfg, model.state_dict(), 'blood')
    assert 'mmdet_moe' not in plain.pretty_text
    found = [vars_of(x) for x in detect(plainly(plain, state), 'blood')]
    assert_same(found, detect(model, 'blood'), 'blood')


def test_what_stock_mmdet_does_not_have_or_the_config_did_not_make_is_refused():
    specs = moe_specs('retinanet', ONE)
    model = build('retinanet', moe=specs)
    specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
    cfg = config_of('retinanet', moe=specs)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('neck.')}
    with pytest.raises(ExtractionError, match='the checkpoint is not of this config.*neck'):
        extract_domain(cfg, state, 'blood')
    MODELS.register_module(module=OwnNeck, force=True)
    cfg.model.neck.type = 'OwnNeck'
    with pytest.raises(ExtractionError, match='neck.extra: a Extra is not in stock mmdet'):
        extract_domain(cfg, build('retinanet', moe=specs, neck=cfg.model.neck).state_dict(), 'yard')


class Extra(torch.nn.Module):
    """What only this package has."""

    __module__ = 'mmdet_moe.models.extra'


class OwnNeck(FPN):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = Extra()


def test_classes_are_in_the_order_in_which_mmdet_counts_them(tmp_path):
    """CocoDataset numbers classes as the json does, whatever the label space says."""
    categories = [dict(id=n, name=name) for n, name in enumerate(('dot', 'crack', 'cell'), 4)]
    (tmp_path / 'test.json').write_text(json.dumps(dict(categories=categories)))
    specs = moe_specs('retinanet', ONE)
    model = spread(build('retinanet', moe=specs))
    specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
    cfg = config_of('retinanet', moe=specs)
    blood = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='test.json')
    steps = [dict(type='LoadImageFromFile'), dict(type='SetDomain', domain='blood')]
    cfg.test_dataloader = dict(dataset=dict(domains=dict(blood=blood), pipeline=steps))
    plain, state, classes = extract_domain(cfg, model.state_dict(), 'blood')
    assert classes == plain.test_dataloader.dataset.metainfo.classes == ('dot', 'crack', 'cell')
    assert plain.test_dataloader.dataset.pipeline == steps[:1]  # mmdet has no SetDomain
    for one, other in zip(
        detect(plainly(plain, state), 'blood'), detect(model, 'blood'), strict=True
    ):
        assert [classes[i] for i in one.labels] == [SPACE.classes[i] for i in other.labels]
        assert torch.allclose(one.scores, other.scores, rtol=0, atol=1e-4)


def test_class_rows_of_a_newcomer_are_put_back_in_their_places():
    specs = moe_specs('retinanet', ONE)
    model = spread(build('retinanet', moe=specs, newcomers=['blood']))
    specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
    cfg = config_of('retinanet', moe=specs, newcomers=['blood'])
    for domain in DOMAINS:
        plain, state, _ = extract_domain(cfg, model.state_dict(), domain)
        found = [vars_of(x) for x in detect(plainly(plain, state), domain)]
        assert_same(found, detect(model, domain), domain)


def test_efficientnet_lite_becomes_timms():
    router = dict(type='PlanRouter', plan=ONE.to_dict())
    moe = [dict(targets=r'backbone\.stages\.3', router=router)]

    def options(stages, channels):
        backbone = dict(type='EfficientNetLite', out_indices=stages, norm_eval=True)
        neck = dict(type='FPN', in_channels=channels, out_channels=16, num_outs=3)
        return dict(backbone=backbone, neck=neck, moe=moe)

    whole = options((2, 3, 4), [40, 112, 320])
    model = spread(build('retinanet', **whole))
    plain, state, _ = extract_domain(config_of('retinanet', **whole), model.state_dict(), 'blood')
    assert plain.model.backbone.model_name == 'tf_efficientnet_lite0'
    found = [vars_of(x) for x in detect(plainly(plain, state), 'blood')]
    assert_same(found, detect(model, 'blood'), 'blood')
    short = options((1, 2, 3), [24, 40, 112])
    with pytest.raises(ExtractionError, match="ends with stage 3.*timm's twin has stage 4 too"):
        extract_domain(
            config_of('retinanet', **short), build('retinanet', **short).state_dict(), 'blood'
        )


def test_max_per_img_is_at_most_queries_times_classes():
    specs = moe_specs('dino', ONE)
    model = build('dino', moe=specs)
    specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
    cfg = config_of('dino', moe=specs, test_cfg=dict(max_per_img=300))
    plain, _, _ = extract_domain(cfg, model.state_dict(), 'yard')
    assert plain.model.test_cfg.max_per_img == 10 * 2


def test_stock_mmdet_loads_it_in_a_process_that_cannot_import_this_package(tmp_path):
    expected = {}
    for kind in CONFIGS:
        specs = moe_specs(kind, ONE)
        model = spread(build(kind, moe=specs))
        specs[0]['router'] = {**specs[0]['router'], 'plan': ONE.to_dict()}
        plain, state, classes = extract_domain(
            config_of(kind, moe=specs), model.state_dict(), 'blood'
        )
        (tmp_path / kind).mkdir()
        write_given(plain, state, classes, tmp_path / kind)
        expected[kind] = detect(model, 'blood')
    (tmp_path / 'stock.py').write_text(STOCK)
    done = subprocess.run(
        [sys.executable, 'stock.py', *expected],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=_without_us(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(tuple(DOMAINS['blood']))) == 2
    for kind, instances in expected.items():
        found = torch.load(tmp_path / kind / 'found.pth', weights_only=True)
        assert_same(found, instances, 'blood')


def write_given(plain, state, classes, folder: Path):
    """The extracted detector and two images, for a process without mmdet_moe."""
    (folder / 'plain.py').write_text(plain.pretty_text)
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=state, meta=meta), folder / 'plain.pth')
    metas = [sample('blood', [], []).metainfo for _ in range(2)]
    torch.save(dict(images=images(2), metas=metas), folder / 'given.pth')


def _without_us():
    import os

    return {**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, 'OMP_NUM_THREADS': '1'}
