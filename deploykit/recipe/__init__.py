"""A recipe: everything a run does, as one frozen value read from TOML.

`tables` declares every key, `reading` makes a recipe of a file or of the command line, `meaning` says what does not go together.
"""

from deploykit.recipe.reading import benchmark_table, dump, load, parse, shipped
from deploykit.recipe.tables import (
    OFFERS,
    SCHEMES,
    BenchmarkTable,
    BuildTable,
    DataTable,
    ExportTable,
    FinetuneTable,
    ModelTable,
    PreprocessTable,
    QuantizeTable,
    Recipe,
    TensorRtTable,
    declared,
)

__all__ = [
    "OFFERS",
    "SCHEMES",
    "BenchmarkTable",
    "BuildTable",
    "DataTable",
    "ExportTable",
    "FinetuneTable",
    "ModelTable",
    "PreprocessTable",
    "QuantizeTable",
    "Recipe",
    "TensorRtTable",
    "benchmark_table",
    "declared",
    "dump",
    "load",
    "parse",
    "shipped",
]
