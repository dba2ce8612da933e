"""What each kernel module says about its kernels so that they can be compiled without a GPU.

A module's ``aot_cases()`` lists every kernel in every configuration it is launched with;
``kernels/aot/compile.py`` compiles the list for each GPU architecture and checks the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIDTHS = (768, 1024, 1536, 2048, 2304, 4096)


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    ``signature`` maps every argument that is not a constexpr to its type in Triton's notation:
    ``"*fp32"`` a pointer, ``"i32"`` or ``"fp32"`` a scalar. Pointers and the integers named in
    ``divisible`` are taken to be multiples of 16, as a launch with real tensors would find them.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    capabilities: range = range(80, 1000)
    vector_loads: bool = True  # 128-bit global loads (or bulk tensor copies) are expected
    matrix: bool = False  # matrix instructions are expected: wgmma on sm_90, mma elsewhere
    representative: bool = False  # part of the slice that the tests compile
