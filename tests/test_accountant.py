"""The accountant against that of Opacus on twenty settings, whose numbers were made once in an environment of its own."""
import subprocess
import sys

import pytest

from fedgal.privacy.accountant import Accountant, Charge, gaussian_rdp, rdp_epsilon, sampled_rdp

OPACUS = {  # (noise, rate, steps) -> epsilon at delta = 1e-5; RDPAccountant of Opacus 1.6.0 under torch 2.13.0
    (0.8, 1.0, 1): 6.122757864599008,
    (0.8, 1.0, 50): 79.710058425056,
    (0.8, 0.1, 100): 12.358541266986002,
    (0.8, 0.01, 1000): 3.695428832544017,
    (1.0, 1.0, 1): 4.728507067217623,
    (1.0, 1.0, 50): 57.30169282486775,
    (1.0, 0.1, 100): 7.899255002434629,
    (1.0, 0.01, 1000): 2.1013652716430564,
    (1.5, 1.0, 1): 2.98480004524568,
    (1.5, 1.0, 50): 32.34885332607256,
    (1.5, 0.1, 100): 3.9233957319180446,
    (1.5, 0.01, 1000): 1.0129527672164003,
    (2.0, 1.0, 1): 2.1657156590294435,
    (2.0, 1.0, 50): 22.019852327713252,
    (2.0, 0.1, 100): 2.5805688086608938,
    (2.0, 0.01, 1000): 0.6861853363943466,
    (4.0, 1.0, 1): 1.0125506277526435,
    (4.0, 1.0, 50): 9.234958991683898,
    (4.0, 0.1, 100): 1.0817024008569973,
    (4.0, 0.01, 1000): 0.30116115855491327,
}


@pytest.mark.parametrize("setting", OPACUS, ids=str)
def test_the_same_epsilon(setting):
    z, rate, steps = setting
    charge = Charge("a step", "record", "zero-out", 1.0, z, steps, rate)
    rdp = gaussian_rdp(charge.mu) if rate == 1 else sampled_rdp(z, rate, steps)
    assert rdp_epsilon(rdp, 1e-5) == pytest.approx(OPACUS[setting], rel=1e-9)
    stated = Accountant().spend(charge).epsilon()
    if rate == 1:
        assert 0.8 * OPACUS[setting] < stated < OPACUS[setting], "without sampling the account is exact, below a Renyi bound"
    else:
        assert stated == pytest.approx(OPACUS[setting], rel=1e-9)


def test_two_processes_draw_the_same_noise_only_if_it_is_repeatable():
    draw = "from fedgal.core.random import PrivacyNoise; print(*(PrivacyNoise(seed, 'release', 1, 2).normal((4,)).tolist() for seed in (None, 0)), sep='\\n')"
    first, second = (subprocess.run([sys.executable, "-c", draw], capture_output=True, text=True, check=True).stdout.splitlines() for _ in range(2))
    assert first[0] != second[0] and first[1] == second[1]
