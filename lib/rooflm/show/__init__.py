"""Presentation: figures, tables, checks and explorers. Nothing is computed here.

Every function returns an object that displays itself when it ends a cell; figures carry
alternative text, which is also what a terminal shows.
"""

try:
    from rooflm.show.checks import check, checks
    from rooflm.show.distillation_explorer import distillation_explorer
    from rooflm.show.eviction_explorer import eviction_explorer
    from rooflm.show.figures import bars, figure, lines, memory_bars, operator_bars, roofline, roofs
    from rooflm.show.finetuning_explorer import finetuning_explorer
    from rooflm.show.fits_explorer import fits_explorer
    from rooflm.show.formats_explorer import formats_explorer
    from rooflm.show.frontier import Measured, frontier
    from rooflm.show.grids import grids
    from rooflm.show.kv_bits_explorer import kv_bits_explorer
    from rooflm.show.low_rank_explorer import low_rank_explorer
    from rooflm.show.methods_explorer import methods_explorer
    from rooflm.show.paging_explorer import paging_explorer
    from rooflm.show.pass_explorer import explorer
    from rooflm.show.scatter import scatter
    from rooflm.show.sparsity_explorer import sparsity_explorer
    from rooflm.show.tables import operators, table
    from rooflm.show.text import equation, say, takeaway
    from rooflm.show.words import si
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'rooflm.show needs {missing.name}; install "rooflm[show]"', name=missing.name
    ) from None

__all__ = [
    "Measured",
    "bars",
    "check",
    "checks",
    "distillation_explorer",
    "equation",
    "eviction_explorer",
    "explorer",
    "figure",
    "finetuning_explorer",
    "fits_explorer",
    "formats_explorer",
    "frontier",
    "grids",
    "kv_bits_explorer",
    "lines",
    "low_rank_explorer",
    "memory_bars",
    "methods_explorer",
    "operator_bars",
    "operators",
    "paging_explorer",
    "roofline",
    "roofs",
    "say",
    "scatter",
    "si",
    "sparsity_explorer",
    "table",
    "takeaway",
]
