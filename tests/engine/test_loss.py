import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from etude.engine.loss import CHUNK, cross_entropy


def case(rows, vocabulary, targets, seed=0, spread=3.0):
    """Random logits; which row and which token each target is; how much each loss counts."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocabulary) * spread
    return (
        logits,
        torch.randint(rows, (targets,)),
        torch.randint(vocabulary, (targets,)),
        torch.randn(targets),
    )


def ours(logits, row, target, weight):
    """The losses, and the gradient of their weighted sum."""
    logits = logits.clone().requires_grad_()
    losses = cross_entropy(logits, row, target)
    return losses.detach(), torch.autograd.grad(losses, logits, weight)[0]


def plain(logits, row, target, weight):
    """The same by PyTorch: a copy of a row for each of its targets."""
    logits = logits.float().requires_grad_()
    losses = F.cross_entropy(logits[row], target, reduction="none")
    return losses.detach(), torch.autograd.grad(losses, logits, weight)[0]


# Few rows and tokens: rows, and pairs of a row and a target, repeat; others have no target.
@given(
    rows=st.integers(1, 3 * CHUNK),
    vocabulary=st.integers(1, 9),
    targets=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_are_pytorchs_own(rows, vocabulary, targets, seed):
    logits, row, target, weight = case(rows, vocabulary, targets, seed)
    losses, gradient = ours(logits, row, target, weight)
    expected, expected_gradient = plain(logits, row, target, weight)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_a_row_is_handled_wherever_a_chunk_ends(rows):
    logits, _, target, weight = case(rows, 50, rows)
    row = torch.arange(rows)
    losses, gradient = ours(logits, row, target, weight)
    expected, expected_gradient = plain(logits, row, target, weight)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


def test_a_pair_named_twice_counts_twice_and_a_row_without_a_target_not_at_all():
    logits = case(3, 5, 1)[0]
    twice = ours(logits, torch.tensor([1, 1]), torch.tensor([4, 4]), torch.ones(2))
    once = ours(logits, torch.tensor([1]), torch.tensor([4]), torch.ones(1))
    assert torch.equal(twice[0], once[0].repeat(2))
    torch.testing.assert_close(twice[1], 2 * once[1])
    assert once[1][1].abs().min() > 0
    assert once[1][[0, 2]].count_nonzero() == 0


def test_bfloat16_logits_are_computed_in_float32():
    logits, row, target, weight = case(2 * CHUNK, 40, 300)
    logits = logits.bfloat16()
    losses, gradient = ours(logits, row, target, weight)
    expected, expected_gradient = plain(logits, row, target, weight)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert gradient.dtype == torch.bfloat16
    # Only the gradient is rounded, to 8 bits of what was added up in it.
    bound = torch.zeros(len(logits)).index_add_(0, row, weight.abs())[:, None] * 2**-7
    assert ((gradient.float() - expected_gradient).abs() <= bound).all()
    # The control: bfloat16 throughout would give other losses.
    rounded = F.cross_entropy(logits[row], target, reduction="none")
    assert (rounded.float() - expected).abs().max() > 1e-3


def test_logits_too_large_for_exp_stay_finite():
    logits, row, target, weight = case(70, 20, 90, spread=1e4)
    assert torch.exp(logits).isinf().any()
    losses, gradient = ours(logits, row, target, weight)
    expected, expected_gradient = plain(logits, row, target, weight)
    torch.testing.assert_close(losses, expected, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def test_nothing_as_wide_as_the_vocabulary_is_kept_but_the_logits_themselves():
    def kept(losses_of):
        wide = set()

        def note(tensor):
            if tensor.ndim == 2 and tensor.shape[1] == 50:
                wide.add((tensor.data_ptr(), len(tensor)))
            return tensor

        logits, row, target, _ = case(10, 50, 30)
        logits.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses_of(logits, row, target)
        return wide, {(logits.data_ptr(), 10)}

    wide, logits = kept(cross_entropy)
    assert wide == logits
    # The control: PyTorch's own keeps a copy of the row for each target.
    wide, logits = kept(lambda z, row, target: F.cross_entropy(z[row], target))
    assert {length for _, length in wide} == {30}
