"""The accelerators that utilisation is measured against and plans are made for."""

import difflib
from dataclasses import dataclass


class ChipError(ValueError):
    """A chip that the table does not have; the message names the nearest."""


@dataclass(frozen=True)
class Chip:
    """One accelerator, as one device of JAX.

    Attributes:
        name: short, as the command line takes it.
        kinds: `device_kind` of JAX's device; of GPUs, the name that the driver gives.
        peak_flops: of dense bfloat16 matrix products, a second (float16 where the chip has no bfloat16); the vendor's.
        memory_bytes: of its high-bandwidth memory, the vendor's; compilers and drivers keep a part for themselves.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int

    @property
    def platform(self) -> str:
        """JAX's name: "tpu" or "gpu"."""
        return "tpu" if self.kinds[0].startswith("TPU") else "gpu"


GIB = 2**30

# TPUs: "System architecture" pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), peak compute and HBM a chip; kinds
# as the compile-only client names them. A v4 or v5p chip is one device: its two cores work as one (megacore).
# GPUs: NVIDIA's data sheets, without sparsity, which the sheets of H100, H200 and L4 count in (half of what they say).
_SXM_A100 = 312e12
CHIPS: tuple[Chip, ...] = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB),
    Chip("a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), _SXM_A100, 40 * GIB),
    Chip("a100-80", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), _SXM_A100, 80 * GIB),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80 * GIB),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756.5e12, 80 * GIB),
    Chip("h200", ("NVIDIA H200",), 989.4e12, 141 * 10**9),
    Chip("l4", ("NVIDIA L4",), 121e12, 24 * GIB),
    # no bfloat16 units: the peak is that of float16, and bfloat16 products are far slower
    Chip("v100-16", ("Tesla V100-SXM2-16GB", "Tesla V100-PCIE-16GB"), 125e12, 16 * GIB),
    Chip("v100-32", ("Tesla V100-SXM2-32GB", "Tesla V100-PCIE-32GB", "Tesla V100-SXM3-32GB"), 125e12, 32 * GIB),
)


def chip_of(device) -> Chip | None:
    """The chip of a JAX device; None for a CPU and for what the table does not have."""
    return next((chip for chip in CHIPS if device.device_kind in chip.kinds), None)


def chip_named(name: str) -> Chip:
    """The chip of this name. Raises ChipError with the nearest names if there is none."""
    for chip in CHIPS:
        if chip.name == name.lower():
            return chip
    near = difflib.get_close_matches(name.lower(), [chip.name for chip in CHIPS], n=4, cutoff=0.3)
    raise ChipError(f"no chip is called {name!r}; the nearest: {', '.join(near or (c.name for c in CHIPS))}")
