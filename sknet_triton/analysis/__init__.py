"""How selective-kernel units choose among their branches (Li et al. 2019, figures 3 and 4)."""

from sknet_triton.analysis.record import (
    SCALES,
    Unit,
    enlarge,
    record_attention,
    record_sizes,
    sk_units,
)
from sknet_triton.analysis.table import (
    over_classes,
    plot_classes,
    plot_units,
    read_csv,
    save_figure,
    write_csv,
)

__all__ = [
    "SCALES",
    "Unit",
    "enlarge",
    "over_classes",
    "plot_classes",
    "plot_units",
    "read_csv",
    "record_attention",
    "record_sizes",
    "save_figure",
    "sk_units",
    "write_csv",
]
