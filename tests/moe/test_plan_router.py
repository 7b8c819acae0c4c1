"""The static plan: known domains by name, unknown ones by the embedding."""

import math

import pytest
import torch
from moe_testlib import MIXED, moe_of, plan_router, scatter_experts
from torch import nn

from mmdet_moe.moe import PlanRouter, RoutingContext, RoutingState, check_datasets
from mmdet_moe.planning import ExpertPlan

MEANS = {'a': [1.0, 0.0], 'b': [0.0, 1.0], 'mixed': [-1.0, 0.0]}


def plan_with_prototypes(concentration=2.0):
    prototypes = dict(embedder={}, dimension=2, mean=MEANS, concentration=concentration)
    return ExpertPlan.from_assignment(MIXED, prototypes=prototypes)


def weights_of(router, domains, embed=None, num_images=None):
    state = RoutingState()
    state.begin(domains, num_images, embed)
    images = state.num_images
    return router.image_weights(RoutingContext(state, images, training=False))


def test_known_domains_get_the_plans_weights_and_no_embedding_is_asked():
    def embed():
        raise AssertionError('no embedding is needed')

    router = PlanRouter(plan_with_prototypes())
    weights = weights_of(router, ['mixed', 'b', 'a'], embed)
    assert weights.tolist() == [[0.25, 0, 0.75], [0, 1, 0], [1, 0, 0]]
    assert router.keeps_dense_function and not list(router.parameters())


def test_a_plan_is_taken_from_a_file_a_dict_an_object_or_by_hand(tmp_path):
    plan = plan_with_prototypes()
    plan.save(tmp_path / 'plan.json')
    for given in (str(tmp_path / 'plan.json'), plan.to_dict(), plan, MIXED):
        router = PlanRouter(given)
        assert router.datasets == ('a', 'b', 'mixed') and router.experts == ('e0', 'e1', 'e2')
    assert router.experts_of('mixed') == [0, 2]


@pytest.mark.parametrize('name', [None, 'newcomer'])
def test_nearest_routes_an_unknown_domain_as_the_closest_dataset(name):
    router = PlanRouter(plan_with_prototypes(), unknown='nearest')
    # Cosines with a, b, mixed: (.6, .8, -.6) -> b; (-.8, .6, .8) -> mixed. Length does not matter.
    z = torch.tensor([[0.6, 0.8], [9.0, 9.0], [-8.0, 6.0]])
    weights = weights_of(router, [name, 'a', name], lambda: z)
    assert weights.tolist() == [[0, 1, 0], [1, 0, 0], [0.25, 0, 0.75]]


def test_mixture_weighs_the_experts_by_the_posterior_over_datasets():
    router = PlanRouter(plan_with_prototypes(concentration=2.0), unknown='mixture')
    weights = weights_of(router, [None], lambda: torch.tensor([[0.6, 0.8]]))[0]
    # exp(2 cos): a exp(1.2), b exp(1.6), mixed exp(-1.2)
    a, b, mixed = math.exp(1.2), math.exp(1.6), math.exp(-1.2)
    total = a + b + mixed
    expected = [(a + 0.25 * mixed) / total, b / total, 0.75 * mixed / total]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_error_refuses_and_lists_what_is_known():
    router = PlanRouter(plan_with_prototypes(), unknown='error')
    with pytest.raises(ValueError, match="image 1 of the batch, domain 'x'.*'a', 'b', 'mixed'"):
        weights_of(router, ['a', 'x'])


def test_no_domains_at_all_means_all_unknown():
    router = PlanRouter(plan_with_prototypes())
    weights = weights_of(router, None, lambda: torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2)
    assert weights.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_unknown_domains_need_prototypes_and_a_fitting_embedder():
    with pytest.raises(ValueError, match="domain 'x': not in the plan, which has no prototypes"):
        weights_of(PlanRouter(MIXED), ['x'])
    with pytest.raises(ValueError, match='the embedder gives 3 numbers, the prototypes .* have 2'):
        weights_of(PlanRouter(plan_with_prototypes()), ['x'], lambda: torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match='give the model an embedder'):
        weights_of(PlanRouter(plan_with_prototypes()), ['x'])


def test_layers_with_one_plan_compute_its_weights_once_per_forward():
    calls = []

    class Counting(PlanRouter):
        def _image_weights(self, *args):
            calls.append(args)
            return super()._image_weights(*args)

    state = RoutingState()
    plan = plan_with_prototypes()
    layers = [moe_of(nn.Linear(4, 4), state, router=Counting(plan))[0] for _ in range(3)]
    layers.append(moe_of(nn.Conv2d(4, 4, 1), state, router=Counting(plan))[0])
    embeds = []

    def embed():
        embeds.append(1)
        return torch.tensor([[0.6, 0.8], [1.0, 0.0]])

    for _ in range(2):
        state.begin([None, 'a'], embed=embed)
        x = torch.randn(2, 4, 4, 4)
        for layer in layers:
            layer(x)
    assert len(calls) == 2 and len(embeds) == 2


def test_plans_that_differ_do_not_share():
    state = RoutingState()
    one, _ = moe_of(nn.Linear(4, 4), state, router=plan_router(dict(a='e0', b='e1')))
    two, _ = moe_of(nn.Linear(4, 4), state, router=plan_router(dict(a='e1', b='e0')))
    scatter_experts(one)
    scatter_experts(two)
    state.begin(['a', 'b'])
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(one(x)[0], one.experts[0](x[0]))
    torch.testing.assert_close(two(x)[0], two.experts[1](x[0]))


def test_other_datasets_than_the_plans_are_an_error_that_lists_both_sides():
    model = nn.ModuleDict({'head': moe_of(nn.Linear(4, 4))[0]})
    check_datasets(model, ['c', 'b', 'a'])
    with pytest.raises(ValueError) as error:
        check_datasets(model, ['a', 'b', 'd'])
    message = str(error.value)
    assert message.startswith('head: ')
    assert "only in the data: ['d']" in message and "only in the plan: ['c']" in message
    assert "plan: ['a', 'b', 'c']; data: ['a', 'b', 'd']" in message


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(plan=MIXED, unknown='guess'), "unknown must be one of .* got 'guess'"),
        (dict(plan=MIXED, num_experts=4), r'the layer has 4 experts, the plan 3 \(e0, e1, e2\)'),
        (dict(plan='nowhere/plan.json'), 'nowhere/plan.json'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        PlanRouter(**arguments)


def test_a_third_each_still_sums_to_one():
    router = PlanRouter(dict(a=dict(e0=0.3333333, e1=0.3333333, e2=0.3333333)))
    assert weights_of(router, ['a']).sum().item() == pytest.approx(1, abs=1e-15)
