"""The noise scale: known ones are found, and what cannot be told is not told."""

import numpy as np
import pytest

from snr_adam import noise_scale


@pytest.mark.parametrize(
    ("scalars", "said"),
    [
        ((4.0, 1.0, 0.1), "96 +- 13"),
        ((4.0, 0.201, 0.1), "605 +- 317"),
        ((4.0, 0.199, 0.1), ">= 289"),
        ((4.0, 0.0, 0.1), ">= 608"),
        ((4.0, -3.0, 0.1), ">= 608"),
        ((4.0, 1.0, 5.0), ">= 0"),
        ((4.0, 5.0, 0.1), "0 +- 0.51"),
        ((4.0, 1.0, np.nan), "96 +- ?"),
        ((4.0, -1.0, np.nan), ">= ?"),
        ((0.0, 0.0, 0.0), ">= ?"),
        ((np.nan, 1.0, 0.1), "nan +- ?"),
    ],
)
def test_what_is_said_of_two_scalars(scalars, said):
    assert str(noise_scale.from_scalars(*scalars, batch_size=32)) == said
