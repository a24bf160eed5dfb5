"""Names of the precisions and of the ways to run a network, for schemas; imports no torch."""

from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Name = Literal[
    "nchw",
    "channels_last",
    "compiled",
    "compiled_blocks",
    "graphs",
    "nchw_search",
    "channels_last_search",
    "compiled_search",
    "compiled_blocks_search",
    "graphs_search",
]
