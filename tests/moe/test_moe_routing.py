"""A routing is a list of (item, expert) pairs grouped by expert."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mmdet_moe.moe import Routing, RoutingContext, RoutingState
from mmdet_moe.moe.routers.gated import drop_over_capacity


def pairs_of(routing):
    """{(item, expert): weight}, read back from the grouped form."""
    experts = [e for e, count in enumerate(routing.counts) for _ in range(count)]
    weights = [1.0] * len(experts) if routing.weights is None else routing.weights.tolist()
    return {(i, e): w for i, e, w in zip(routing.items.tolist(), experts, weights, strict=True)}


def test_topk_groups_the_pairs_by_expert():
    # item 0 -> experts 2, 0; item 1 -> 0, 1; item 2 -> 2, 1.
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.875, 0.125]])
    routing = Routing.from_topk(weights, torch.tensor([[2, 0], [0, 1], [2, 1]]), num_experts=4)
    assert routing.counts == [2, 2, 2, 0]
    assert routing.items.tolist() == [0, 1, 1, 2, 0, 2]
    assert routing.weights.tolist() == [0.25, 0.5, 0.5, 0.125, 0.75, 0.875]
    # Where the pairs (0, 2) (0, 0) (1, 0) (1, 1) (2, 2) (2, 1) went
    assert routing.inverse.tolist() == [4, 0, 1, 2, 5, 3] and routing.k == 2


def test_top1_knows_when_the_items_are_in_the_order_of_their_experts():
    assert not Routing.from_topk(None, torch.tensor([[1], [0], [1]]), 2).in_order
    assert Routing.from_topk(None, torch.tensor([[0], [1], [1]]), 2).in_order
    assert not Routing.from_topk(None, torch.tensor([[0, 1], [0, 1]]), 2).in_order


def test_dense_sees_that_each_item_has_as_many_experts():
    assert Routing.from_dense(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])).k == 2
    assert Routing.from_dense(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.9]])).inverse is None


def test_dropped_pairs_are_left_out():
    indices = torch.tensor([[0, -1], [-1, -1], [1, 0]])
    weights = torch.tensor([[0.5, 9.0], [9.0, 9.0], [0.25, 0.75]])
    routing = Routing.from_topk(weights, indices, 2, dropping=True)
    assert pairs_of(routing) == {(0, 0): 0.5, (2, 1): 0.25, (2, 0): 0.75}
    assert routing.inverse is None


def test_dense_takes_any_number_of_experts_per_item():
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    routing = Routing.from_dense(weights)
    assert pairs_of(routing) == {(0, 1): 0.5, (0, 2): 0.5, (2, 0): 1.0}


def test_dense_ones_need_no_weights_and_a_shared_expert_no_items():
    assert Routing.from_dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).weights is None
    routing = Routing.from_dense(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert routing.expert == 1 and routing.counts == [0, 2] and routing.items is None
    # One expert, but not with weight 1.
    routing = Routing.from_dense(torch.tensor([[0.0, 0.5], [0.0, 0.5]]))
    assert routing.expert is None and routing.weights.tolist() == [0.5, 0.5]


class Waits(TorchFunctionMode):
    """Counts the operations that would wait for a device."""

    NAMES = ('tolist', 'item', '__bool__', '__int__', '__float__', '__index__', 'nonzero',
             'bincount', 'masked_select', 'unique')  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        masks = [a for a in args[1:] if isinstance(a, torch.Tensor) and a.dtype == torch.bool]
        by_mask = name in ('__getitem__', '__setitem__') and masks
        if name in self.NAMES or by_mask or (name == 'where' and len(args) == 1):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


DENSE = {
    'ragged': [[0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
    'one each': [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    'two each': [[0.0, 0.5, 0.5], [0.25, 0.0, 0.75], [0.5, 0.5, 0.0]],
    'none': [[0.0, 0.0, 0.0]] * 2,
    'empty': [],
}


@pytest.mark.parametrize('name', DENSE)
def test_on_a_device_a_routing_waits_once_and_is_the_same(name, monkeypatch):
    weights = torch.tensor(DENSE[name]).reshape(-1, 3)
    indices = weights.topk(2, dim=1).indices
    on_host = [Routing.from_dense(weights), Routing.from_topk(None, indices, 3)]
    monkeypatch.setattr('mmdet_moe.moe.routing.on_host', lambda tensor: False)
    makers = [lambda: Routing.from_dense(weights), lambda: Routing.from_topk(None, indices, 3)]
    for make, expected in zip(makers, on_host, strict=True):
        with Waits() as waits:
            found = make()
        assert waits.found in (['tolist'], [])
        assert found.counts == expected.counts and found.k == expected.k
        assert (found.inverse is None) == (expected.inverse is None)
        if expected.expert is None:
            assert pairs_of(found) == pairs_of(expected)
        if found.inverse is not None:
            in_turn = torch.arange(found.num_items).repeat_interleave(found.k)
            assert found.items[found.inverse].equal(in_turn)


def test_a_capacity_needs_no_wait():
    indices = torch.tensor([[0, 1], [0, 1], [1, 0]])
    with Waits() as waits:
        drop_over_capacity(indices, 2, 2, torch.tensor([0.1, 0.3, 0.2]))
    assert waits.found == []


def test_expert_choice_is_expressed_by_pairs_in_any_order():
    # Expert 1 takes items 0 and 2, expert 0 takes item 2; item 1 is taken by none.
    routing = Routing.from_pairs(
        torch.tensor([0, 2, 2]), torch.tensor([1, 1, 0]), torch.tensor([0.1, 0.2, 0.3]), 3, 2
    )
    assert pairs_of(routing) == pytest.approx({(2, 0): 0.3, (0, 1): 0.1, (2, 1): 0.2})


def test_importance_sums_the_weights_and_keeps_the_gradient():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    routing = Routing.from_topk(weights, torch.tensor([[0, 1], [0, 2]]), 4)
    # expert 0: .75 + .5, expert 1: .25, expert 2: .5, expert 3: nothing
    assert routing.importance().tolist() == [1.25, 0.25, 0.5, 0.0]
    routing.importance()[0].backward()
    assert weights.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_empty_batch():
    routing = Routing.from_topk(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.long), 3)
    assert routing.counts == [0, 0, 0] and routing.importance().tolist() == [0.0] * 3
    assert Routing.from_dense(torch.zeros(0, 3)).counts == [0, 0, 0]


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: Routing.single(3, 4, 3), 'expert 3 is not one of the 3'),
        (lambda: Routing.from_topk(None, torch.tensor([[0], [5]]), 3), 'chose expert 5'),
        (lambda: Routing.from_topk(torch.ones(2, 1), torch.zeros(2, 2).long(), 3), r'\(T, k\)'),
        (lambda: Routing.from_dense(torch.ones(3)), r'\(T, E\)'),
        (
            lambda: Routing.from_pairs(torch.arange(2), torch.arange(3), None, 2, 3),
            '2 items, 3 experts',
        ),
        (
            lambda: Routing.from_pairs(
                torch.arange(2), torch.tensor([0, -1]), None, 2, 3, uniform=1
            ),
            r'2 pairs \(1 dropped\) are not 1 per item',
        ),
    ],
)
def test_bad_routings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_context_knows_the_image_of_each_token():
    state = RoutingState()
    state.begin(['a', 'b'])
    context = RoutingContext(state, num_items=6, training=True, items_per_image=3)
    assert context.image_of_item.tolist() == [0, 0, 0, 1, 1, 1]
    assert RoutingContext(state, num_items=2, training=True).image_of_item is None


def test_context_refuses_items_that_are_not_images():
    state = RoutingState()
    state.begin(['a', 'b'])
    context = RoutingContext(state, num_items=512, training=True, layer='roi_head.fc')
    with pytest.raises(ValueError, match="'roi_head.fc' got 512 items .* 2 images"):
        _ = context.num_images


def test_state_checks_its_inputs():
    state = RoutingState()
    with pytest.raises(ValueError, match='2 domains for 3 images'):
        state.begin(['a', 'b'], num_images=3)
    with pytest.raises(TypeError, match='one name per image'):
        state.begin('bccd')
    state.begin(['a', None], embed=lambda: torch.zeros(3, 4))
    with pytest.raises(ValueError, match='3 embeddings for 2 images'):
        state.embeddings()
    state.begin([None])
    with pytest.raises(RuntimeError, match='give the data sample its domain'):
        state.embeddings()


def test_embeddings_and_shared_values_are_computed_once_per_forward():
    calls = []

    def embed():
        calls.append(torch.is_grad_enabled())
        return torch.ones(1, 2, requires_grad=True) * 2

    state = RoutingState()
    for _ in range(2):
        state.begin([None], embed=embed)
        assert not state.embeddings().requires_grad
        assert state.embeddings() is state.embeddings()
        assert state.cached('x', lambda: [1]) is state.cached('x', lambda: [2])
    assert calls == [False, False]


def test_statistics_are_never_called_loss():
    state = RoutingState()
    state.begin(['a'])
    state.add_stats('loss_head.fc', {'weight': torch.ones(2)})
    state.add_stats('loss_head.fc', {'weight': torch.ones(2)})
    assert list(state.stats()) == ['los_head.fc/weight']
    assert state.stats()['los_head.fc/weight'].tolist() == [2.0, 2.0]
