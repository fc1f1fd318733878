import pytest
import torch

from steer_heal.account import Tally

BEST = {"gflop_per_s": 1e9, "gb_per_s": 1e9}


def counted(work, seconds: float = 1.0, **best: float) -> dict[str, float]:
    with Tally() as tally:
        work()
    return tally.account(seconds, BEST | best)


def test_products_are_counted_with_their_operations_forward_and_backward():
    x, w = torch.randn(3, 2, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    slope = torch.ones(3, 2, 4)
    found = counted(lambda: torch.nn.functional.linear(x, w).backward(slope))
    assert found["gflop"] * 1e9 == pytest.approx(3 * 2 * 6 * 10 * 4), "y, and the gradients of x and w"
    assert (found["n_calls"], found["other_gb"]) == (3, 0), "views touch no numbers"
    biased = counted(lambda: torch.nn.functional.linear(x.detach(), w.detach(), torch.zeros(4)))
    batched = counted(lambda: torch.randn(3, 6, 10) @ torch.randn(3, 10, 4))
    assert biased["gflop"] * 1e9 == pytest.approx(2 * 6 * 10 * 4) and batched["gflop"] * 1e9 == pytest.approx(
        3 * 2 * 6 * 10 * 4
    )


def test_attention_is_a_product_forward_and_backward():
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    one = 2 * 2 * 3 * 40 * 40 * 8
    assert counted(attend)["gflop"] * 1e9 == pytest.approx(2 * one), "queries with keys, weights with values"
    assert counted(lambda: attend().sum().backward())["gflop"] * 1e9 == pytest.approx(7 * one)


def test_other_operators_are_counted_in_bytes():
    x = torch.randn(100, 50)
    found = counted(lambda: x.T.reshape(50, 100)[:, :10].exp())
    assert found["gflop"] == found["products_s"] == 0 and found["n_calls"] == 1
    assert found["other_gb"] * 1e9 == pytest.approx(2 * 50 * 10 * 4)


def test_of_a_table_the_rows_that_are_picked_count():
    table, i = torch.randn(1000, 8), torch.tensor([1, 2, 3])
    assert counted(lambda: torch.nn.functional.embedding(i, table))["other_gb"] * 1e9 == pytest.approx(2 * 3 * 8 * 4)


def test_the_best_is_bound_by_operations_or_by_bytes():
    a, b = torch.randn(1, 1000), torch.randn(1000, 1000)
    assert counted(lambda: a @ b, gflop_per_s=1.0)["at_best_s"] == pytest.approx(2e-3)
    assert counted(lambda: a @ b, gb_per_s=1.0)["at_best_s"] == pytest.approx(4e-3 + 8e-6)


def test_what_lies_between_operators_is_left_over():
    wide = torch.randn(300, 300)
    found = counted(lambda: [torch.logsumexp(wide @ wide, -1) for _ in range(3)], seconds=10.0)
    assert found["n_calls"] >= 6 and found["products_s"] > 0 and found["others_s"] > 0
    assert 0 < found["between_s"] < 10 - found["products_s"]


def test_operators_run_again_on_operands_of_the_same_kind():
    """In place, from lists, with indices, masked, over expanded and empty tensors: all of it can be made again."""
    x, i = torch.randn(5, 8), torch.tensor([[0], [1], [2], [3], [4]])
    q, mask = torch.randn(1, 2, 6, 4), torch.ones(1, 1, 6, 6, dtype=torch.bool)

    def work():
        torch.cat([x, x.expand(5, 8), torch.empty(0, 8)]).add_(1.0)
        x.gather(-1, i).scatter_add_(-1, torch.zeros_like(i), torch.ones(5, 1))
        torch.ones(1, 1).expand(5, 8).softmax(-1).cumsum(-1, dtype=torch.float64)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert counted(work)["others_s"] > 0
