import pytest
import torch

from pruning_utils import scores

SCORES = [scores.random, scores.l1, scores.l1_global, scores.l2, scores.l2_filters]


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.__name__)
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_has_the_shape_it_says_and_leaves_the_weight_alone(score, shape, dtype):
    weight = torch.randn(shape, dtype=dtype)
    before = weight.clone()
    importance = score(weight)
    assert importance.shape == (shape if score.granularity == "weight" else shape[:1])
    assert importance.dtype == torch.float32
    assert torch.equal(weight, before)
    assert score.seeded or torch.equal(importance, score(weight.float()))


def test_what_the_scores_are():
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert torch.equal(scores.l1(weight), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert torch.equal(scores.l2(weight), torch.tensor([[9.0, 16.0], [0.0, 1.0]]))
    assert torch.equal(scores.l2_filters(weight), torch.tensor([5.0, 1.0]))
    assert scores.l1_global.scope == "global" and scores.l1.scope == "layer"


def test_random_follows_its_generator():
    weight = torch.zeros(50)
    one, same = (scores.random(weight, torch.Generator().manual_seed(1)) for _ in range(2))
    other = scores.random(weight, torch.Generator().manual_seed(2))
    assert torch.equal(one, same) and not torch.equal(one, other)
