"""Numbers as people read them."""

import numpy as np

from fem_diffusion.page import words


def test_numbers_have_three_digits_units_and_powers_of_ten():
    for x, text in [(0, "0"), (1.2345, "1.23"), (12345.6, "12,300"), (999.6, "1,000"), (0.0012345, "0.00123"),
                    (1.2345e-5, "1.23 × 10⁻⁵"), (-4.5678e7, "−4.57 × 10⁷"), (np.nan, "unknown"), (9.999, "10.0")]:
        assert words.number(x).replace("\u00a0", " ") == text
    assert words.number(1.6, "W/(m K)") == "1.60\u00a0W/(m\u00a0K)"
    assert words.number(1.6, "noise standard deviations") == "1.60\u00a0noise standard deviations"
    for x, text in [(1.6, "1.6"), (1500, "1,500"), (0.125, "0.125"), (1e7, "1 × 10⁷"), (1 / 3, "0.333333"), (0, "0")]:
        assert words.given(x).replace("\u00a0", " ") == text
    for pair, text in [((1.5923, 0.1771), "1.59 ± 0.18"), ((12345.0, 234.0), "12,340 ± 230"),
                       ((-0.001, 0.5), "0.00 ± 0.50"), ((1.23456e-6, 3.4e-8), "(1.235 ± 0.034) × 10⁻⁶"),
                       ((2.0, 0.0), "2.00"), ((1.0, 1e-12), "1.00000 ± 0.00000")]:
        assert words.plus_minus(*pair).replace("\u00a0", " ") == text
    assert words.interval(0.57123, 0.74999) == "0.57 to 0.75"
    for (share, n), text in [((0.34, 100), "34 %"), ((0, 1000), "below 0.3 %"), ((1, 100), "above 97 %"),
                             ((0.004, 1000), "0.4 %"), ((0.9996, 10000), "99.96 %")]:
        assert words.chance(share, n).replace("\u00a0", " ") == text
    for x, text in [(0.5312, "0.53 s"), (75, "75 s"), (600, "10 min"), (90000, "25 h")]:
        assert words.seconds(x).replace("\u00a0", " ") == text
