"""The label space goes by name and never shifts an id."""

import json

import pytest

from mmdet_moe.structures import LabelSpace, LabelSpaceError

DOMAINS = dict(voc=['cat', 'aeroplane'], coco=['airplane', 'dog', 'cat'], kitti=['car'])


def test_unified_classes_stand_in_order_of_first_appearance():
    space = LabelSpace(DOMAINS)
    assert space.domains == ('voc', 'coco', 'kitti')
    assert space.classes == ('cat', 'aeroplane', 'airplane', 'dog', 'car')
    assert space.unified_ids('voc') == (0, 1)
    assert space.unified_ids('coco') == (2, 3, 0)
    assert space.unified_ids('kitti') == (4,)
    assert space.local_ids('coco') == (2, -1, 0, 1, -1)
    assert space.num_classes == 5 and space.unified_id('dog') == 3


def test_synonyms_merge_into_the_canonical_name():
    space = LabelSpace(DOMAINS, synonyms={'aeroplane': 'plane', 'airplane': 'plane'})
    assert space.classes == ('cat', 'plane', 'dog', 'car')
    assert space.unified_ids('voc') == (0, 1)
    assert space.unified_ids('coco') == (1, 2, 0)
    chained = LabelSpace(DOMAINS, synonyms={'aeroplane': 'airplane', 'airplane': 'plane'})
    assert chained.classes == space.classes


def test_a_synonym_may_speak_of_one_domain_only():
    space = LabelSpace(dict(a=['mouse'], b=['mouse']), synonyms={'b/mouse': 'computer mouse'})
    assert space.classes == ('mouse', 'computer mouse')


def test_without_merging_every_domain_keeps_its_own_classes():
    space = LabelSpace(DOMAINS, synonyms={'aeroplane': 'airplane'}, merge=False)
    assert space.classes == (
        'voc/cat', 'voc/aeroplane', 'coco/airplane', 'coco/dog', 'coco/cat', 'kitti/car',
    )  # fmt: skip
    assert space.unified_ids('coco') == (2, 3, 4)


def test_a_new_domain_at_the_end_shifts_no_id():
    before, after = LabelSpace(DOMAINS), LabelSpace({**DOMAINS, 'new': ['dog', 'tree']})
    for domain in before.domains:
        assert before.unified_ids(domain) == after.unified_ids(domain)
    assert after.unified_ids('new') == (3, 5)


def test_it_survives_the_config_and_json_round_trip():
    space = LabelSpace(DOMAINS, synonyms={'aeroplane': 'airplane'})
    assert LabelSpace.from_config(json.loads(json.dumps(space.to_dict()))) == space
    assert hash(LabelSpace.from_config(space.to_dict())) == hash(space)
    assert LabelSpace.from_config(space) is space
    assert LabelSpace(DOMAINS) != space
    assert LabelSpace(dict(reversed(DOMAINS.items()))) != LabelSpace(DOMAINS)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(domains={}), 'at least one domain'),
        (dict(domains={'a': []}), "'a' has no classes"),
        (dict(domains={'a': ['x', 'x']}), r"'a' names \['x'\] more than once"),
        (dict(domains={'a/b': ['x']}), 'without a slash'),
        (dict(domains={'macro': ['x']}), 'rename the domain'),
        (dict(domains={'a': ['x', 3]}), '3 is not a class name'),
        (dict(domains={'a': ['x']}, synonyms={'y': 'x'}), "'y': no domain has a class"),
        (dict(domains={'a': ['x']}, synonyms={'x': 'y', 'y': 'x'}), 'circle: x -> y -> x'),
        (dict(domains={'a': ['x', 'y']}, synonyms={'x': 'y'}), "'x' and 'y' both 'y'"),
        (dict(domains={'a': ['x']}, classes=3), r"unknown keys \['classes'\]"),
        (dict(synonyms={}), 'lacks the key "domains"'),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(LabelSpaceError, match=message):
        LabelSpace.from_config(arguments)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="domain 'a': classes must be a list of names, got 'xyz'"):
        LabelSpace({'a': 'xyz'})
    with pytest.raises(TypeError, match='got list'):
        LabelSpace.from_config(['x'])


def test_unknown_names_list_the_known_ones():
    space = LabelSpace(DOMAINS)
    with pytest.raises(LabelSpaceError, match=r"unknown domain 'vco'.*\['voc', 'coco', 'kitti'\]"):
        space.unified_ids('vco')
    with pytest.raises(LabelSpaceError, match=r"no class 'dgo'; its classes are \['airplane'"):
        space.unified_name('coco', 'dgo')
    with pytest.raises(LabelSpaceError, match="no unified class 'unicorn'"):
        space.unified_id('unicorn')
