"""The names of what the equations let one choose, for them and for configurations.

Nothing here imports torch: a configuration is checked without it.
"""

from typing import Literal

Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]
Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["sample_std", "population_std", "batch_std", "none"]
