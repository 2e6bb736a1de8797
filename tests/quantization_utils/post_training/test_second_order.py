from itertools import product

import pytest
import torch
from torch import Tensor

from quantization_utils.post_training.second_order import (
    cholesky,
    damped,
    descend,
    feed_back,
    fit_scale,
    matching_weight,
    output_error,
    search,
    ternarize,
)
from quantization_utils.quantizers import mse_optimal


def problem(channels: int, weights: int, columns: int = 200) -> tuple[Tensor, Tensor]:
    """A weight (N, K) and correlated inputs x (columns, K), float64."""
    mixing_KK = torch.randn(weights, weights, dtype=torch.float64)
    x_PK = torch.randn(columns, weights, dtype=torch.float64) @ mixing_KK
    return torch.randn(channels, weights, dtype=torch.float64), x_PK


def moment(x_PK: Tensor) -> Tensor:
    return x_PK.T @ x_PK / len(x_PK)


def every_code(weights: int) -> Tensor:
    return torch.tensor(list(product((-1, 0, 1), repeat=weights)), dtype=torch.int8)


def test_error_feedback_is_what_solving_the_rest_anew_after_every_column_gives() -> None:
    weight_NK, x_PK = problem(20, 7)
    scale_N = torch.rand(20, dtype=torch.float64) + 0.5
    kept_NK = torch.rand(20, 7) < 0.9
    codes_NK = feed_back(weight_NK, cholesky(moment(x_PK), 0.0), scale_N, kept_NK)
    for n in range(20):
        wanted_P = x_PK @ weight_NK[n]
        rest_K = weight_NK[n].clone()
        for j in range(6, -1, -1):
            code = float((rest_K[j] / scale_N[n]).round().clamp(-1, 1) * kept_NK[n, j])
            assert code == codes_NK[n, j]
            wanted_P = wanted_P - scale_N[n] * code * x_PK[:, j]
            if j:  # the columns left over are fitted to what is left of the output
                rest_K[:j] = torch.linalg.lstsq(x_PK[:, :j], wanted_P[:, None]).solution[:, 0]


@pytest.mark.parametrize("weights", [1, 63, 64, 65, 150])
def test_blocks_of_columns_change_nothing(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, x_PK = problem(5, weights)
    moment_KK, scale_N = damped(moment(x_PK), 0.1), mse_optimal(weight_NK)[1].double()
    kept_NK = torch.rand(5, weights) < 0.8
    factor_KK = cholesky(moment_KK, 0.0)
    codes_NK = feed_back(weight_NK, factor_KK, scale_N, kept_NK)
    better_NK = descend(codes_NK, weight_NK, moment_KK, scale_N, kept_NK)
    searched_NK = search(weight_NK, factor_KK, scale_N, kept_NK, 5)
    monkeypatch.setattr("quantization_utils.post_training.second_order.BLOCK", 1_000)
    assert torch.equal(feed_back(weight_NK, factor_KK, scale_N, kept_NK), codes_NK)
    assert torch.equal(search(weight_NK, factor_KK, scale_N, kept_NK, 5), searched_NK)
    assert torch.equal(search(weight_NK, factor_KK, scale_N, kept_NK, 1), codes_NK)
    assert torch.equal(descend(codes_NK, weight_NK, moment_KK, scale_N, kept_NK), better_NK)
    assert not torch.cat([codes_NK, searched_NK, better_NK])[~kept_NK.repeat(3, 1)].any()


@pytest.mark.parametrize("pruned", [0.0, 0.3])
def test_a_search_that_is_wide_enough_finds_the_best_of_all_codes(pruned: float) -> None:
    weight_NK, x_PK = problem(10, 6)
    moment_KK, scale_N = moment(x_PK), torch.rand(10, dtype=torch.float64) + 0.5
    kept_NK = torch.rand(10, 6) >= pruned
    codes_NK = search(weight_NK, cholesky(moment_KK, 0.0), scale_N, kept_NK, 3**6)
    codes_CK = every_code(6)
    for n in range(10):
        row_CK = weight_NK[n].expand(len(codes_CK), 6)
        error_C = output_error(codes_CK, row_CK, moment_KK, scale_N[n].expand(len(codes_CK)))
        error_C[(codes_CK[:, ~kept_NK[n]] != 0).any(1)] = torch.inf
        assert torch.equal(codes_NK[n], codes_CK[error_C.argmin()])


def test_a_search_is_the_wider_the_fewer_weights_a_channel_has() -> None:
    def lost(weights: int, ways: int) -> float:
        torch.manual_seed(weights)
        weight_NK, x_PK = problem(100, weights)
        kept_NK = torch.ones(100, weights, dtype=torch.bool)
        codes_NK, scale_N = ternarize(weight_NK, moment(x_PK), 0.0, kept_NK, sweeps=0, ways=ways)
        return float(output_error(codes_NK, weight_NK, moment(x_PK), scale_N).sum())

    assert lost(20, ways=39) == lost(20, ways=0) > 1.2 * lost(20, ways=80)
    assert lost(70, ways=80) == lost(70, ways=0)


def test_a_wider_search_loses_less() -> None:
    weight_NK, x_PK = problem(100, 70)
    moment_KK, scale_N = moment(x_PK), mse_optimal(weight_NK)[1].double()
    given = weight_NK, cholesky(moment_KK, 0.0), scale_N, torch.ones(100, 70, dtype=torch.bool)
    errors = [output_error(search(*given, width), weight_NK, moment_KK, scale_N).sum() for width in (1, 4, 32)]
    assert errors[2] < 0.8 * errors[1] < 0.7 * errors[0]


def test_descent_never_loses_and_ends_where_no_single_code_can_be_improved() -> None:
    weight_NK, x_PK = problem(6, 9)
    moment_KK, scale_N = moment(x_PK), torch.full((6,), 0.8, dtype=torch.float64)
    kept_NK = torch.ones(6, 9, dtype=torch.bool)
    codes_NK = torch.zeros(6, 9, dtype=torch.int8)
    error_N = output_error(codes_NK, weight_NK, moment_KK, scale_N)
    for _ in range(20):
        codes_NK = descend(codes_NK, weight_NK, moment_KK, scale_N, kept_NK)
        before_N, error_N = error_N, output_error(codes_NK, weight_NK, moment_KK, scale_N)
        assert (error_N <= before_N * (1 + 1e-9)).all()
    for j, code in product(range(9), (-1, 0, 1)):
        other_NK = codes_NK.clone()
        other_NK[:, j] = code
        assert (output_error(other_NK, weight_NK, moment_KK, scale_N) >= error_N * (1 - 1e-9)).all()


def test_fitted_scale_is_the_best_of_a_fine_grid() -> None:
    weight_NK, x_PK = problem(5, 8)
    codes_NK, start_N = mse_optimal(weight_NK)
    moment_KK = moment(x_PK)
    fitted_N = fit_scale(codes_NK, weight_NK, moment_KK, start_N.double())
    least_N = output_error(codes_NK, weight_NK, moment_KK, fitted_N)
    for scale in torch.linspace(0.01, 4, 400, dtype=torch.float64):
        assert (output_error(codes_NK, weight_NK, moment_KK, scale.expand(5)) >= least_N * (1 - 1e-9)).all()


def test_ternarize_comes_near_to_the_best_of_all_codes() -> None:
    weight_NK, x_PK = problem(40, 7)
    moment_KK = moment(x_PK)
    kept_NK = torch.ones(40, 7, dtype=torch.bool)
    codes_NK, scale_N = ternarize(weight_NK, moment_KK, 0.0, kept_NK)
    torch.testing.assert_close(scale_N, fit_scale(codes_NK, weight_NK, moment_KK, scale_N))
    codes_CK = every_code(7)
    best = []
    for n in range(40):
        row_CK = weight_NK[n].expand(len(codes_CK), 7)
        scale_C = fit_scale(codes_CK, row_CK, moment_KK, torch.ones(len(codes_CK), dtype=torch.float64))
        best.append(output_error(codes_CK, row_CK, moment_KK, scale_C).min())
    nearest_NK, nearest_scale_N = mse_optimal(weight_NK)
    nearest = output_error(nearest_NK, weight_NK, moment_KK, nearest_scale_N.double()).mean()
    found = output_error(codes_NK, weight_NK, moment_KK, scale_N)
    assert (found >= torch.stack(best) * (1 - 1e-9)).all()
    best = torch.stack(best).mean()
    assert found.mean() - best < (nearest - best) / 4


@pytest.mark.parametrize("ways", [0, 50])
def test_channels_are_independent_of_each_other(ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, x_PK = problem(7, 12)
    kept_NK = torch.ones(7, 12, dtype=torch.bool)
    codes_NK, scale_N = ternarize(weight_NK, moment(x_PK), 0.01, kept_NK, ways=ways)
    monkeypatch.setattr("quantization_utils.post_training.second_order.ROWS", 3)
    in_parts_NK, scales_N = ternarize(weight_NK, moment(x_PK), 0.01, kept_NK, ways=ways)
    assert torch.equal(in_parts_NK, codes_NK)
    torch.testing.assert_close(scales_N, scale_N)


def test_weight_that_makes_up_for_earlier_layers_against_a_direct_least_squares_solution() -> None:
    weight_NK, x_PK = problem(3, 6, columns=50)
    float_x_PK = x_PK + 0.5 * torch.randn(50, 6, dtype=torch.float64)
    target_PN = float_x_PK @ weight_NK.T
    damping = 0.05
    found_NK = matching_weight(weight_NK, moment(x_PK), target_PN.T @ x_PK / 50, damping)
    ridge = (50 * damping * moment(x_PK).diagonal().mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    direct_KN = torch.linalg.lstsq(torch.cat([x_PK, ridge]), torch.cat([target_PN, ridge @ weight_NK.T])).solution
    torch.testing.assert_close(found_NK, direct_KN.T)


def test_covariance_without_full_rank_is_damped_more_and_that_is_said() -> None:
    moment_KK = moment(torch.randn(3, 8))  # rank 3
    moment_KK[0, 0] -= 1e-3  # and rounding has made it indefinite
    with pytest.warns(UserWarning, match="no full rank"):
        factor_KK = cholesky(moment_KK, 1e-5)
    assert factor_KK.isfinite().all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="non-finite"):
        cholesky(torch.full((3, 3), torch.nan), 0.01)


def test_inputs_that_never_differ_from_zero_leave_the_weights_to_decide() -> None:
    weight_NK = torch.randn(4, 6)
    codes_NK, scale_N = ternarize(weight_NK, torch.zeros(6, 6), 0.01, torch.ones(4, 6, dtype=torch.bool), sweeps=8)
    torch.testing.assert_close(scale_N, fit_scale(codes_NK, weight_NK, torch.eye(6), scale_N))
    assert codes_NK.any()


def test_with_much_damping_the_weights_alone_decide() -> None:
    weight_NK, x_PK = problem(4, 6)
    kept_NK = torch.ones(4, 6, dtype=torch.bool)
    codes_NK, scale_N = ternarize(weight_NK, moment(x_PK), 1e9, kept_NK)
    wanted_NK, wanted_N = ternarize(weight_NK, torch.eye(6, dtype=torch.float64), 0.0, kept_NK)
    assert torch.equal(codes_NK, wanted_NK)
    torch.testing.assert_close(scale_N, wanted_N)


def test_sweeps_improve_codes_and_not_only_their_scales() -> None:
    weight_NK, x_PK = problem(40, 7)
    kept_NK = torch.ones(40, 7, dtype=torch.bool)
    before, after = (ternarize(weight_NK, moment(x_PK), 0.0, kept_NK, sweeps=sweeps) for sweeps in (0, 4))
    errors = [output_error(codes, weight_NK, moment(x_PK), scale).sum() for codes, scale in (before, after)]
    assert not torch.equal(before[0], after[0]) and errors[1] < 0.99 * errors[0]


def test_the_scale_stays_where_codes_do_not_say_a_better_one() -> None:
    codes_NK, scale_N = torch.tensor([[0, 0], [-1, 0], [1, 0]], dtype=torch.int8), torch.full((3,), 0.7)
    assert torch.equal(fit_scale(codes_NK, torch.ones(3, 2), torch.eye(2), scale_N), torch.tensor([0.7, 0.7, 1.0]))


def test_of_several_scales_to_start_from_the_best_is_taken() -> None:
    weight_NK, x_PK = problem(40, 7)
    kept_NK = torch.ones(40, 7, dtype=torch.bool)
    factors = ((0.8, 1.0, 1.25), (0.8,), (1.0,), (1.25,))
    found = [ternarize(weight_NK, moment(x_PK), 0.0, kept_NK, tried, sweeps=0) for tried in factors]
    best_N, *others = (output_error(codes, weight_NK, moment(x_PK), scale) for codes, scale in found)
    torch.testing.assert_close(best_N, torch.stack(others).amin(0))
    torch.testing.assert_close(found[0][1], fit_scale(found[0][0], weight_NK, moment(x_PK), found[0][1]))
    assert all(best_N.sum() < 0.99 * one_N.sum() for one_N in others)


def test_pruned_weights_do_not_enter_the_scale_to_start_from() -> None:
    weight_NK, kept_NK = torch.randn(4, 6, dtype=torch.float64), torch.arange(6).expand(4, 6) > 0
    eye_KK = torch.eye(6, dtype=torch.float64)
    found = [ternarize(weight_NK.where(kept_NK, pruned), eye_KK, 0.0, kept_NK) for pruned in (0.0, 1e3)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_columns_of_most_energy_are_rounded_first_with_what_belongs_to_them() -> None:
    weight_NK, x_PK = problem(20, 9)
    moment_KK, kept_NK = moment(x_PK), torch.rand(20, 9) < 0.7
    codes_NK, scale_N = ternarize(weight_NK, moment_KK, 0.0, kept_NK, factors=(1.0,), sweeps=0)
    order_K = moment_KK.diagonal().argsort()  # error feedback goes from the last to the first
    nearest_N = mse_optimal(weight_NK * kept_NK)[1].double()
    factor_KK = cholesky(moment_KK[order_K][:, order_K], 0.0)
    wanted_NK = feed_back(weight_NK[:, order_K], factor_KK, nearest_N, kept_NK[:, order_K])
    assert torch.equal(codes_NK[:, order_K], wanted_NK)
    torch.testing.assert_close(scale_N, fit_scale(codes_NK, weight_NK, moment_KK, nearest_N))
