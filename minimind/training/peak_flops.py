"""Peak speed of known GPUs, the denominator of model FLOPs utilization."""

from __future__ import annotations

import re

import torch

# Dense matrix products per second in bf16 with float32 accumulation (fp16 where a GPU has no bf16), as the
# maker states them. Data sheets that print the figure "with sparsity" print twice the dense one, which
# stands here. The pattern is to match the whole name that the driver gives, without the maker: a cut-down
# relative of a GPU (laptop, MIG slice, "D" edition) has another peak and must not be taken for it.
_PEAKS: tuple[tuple[str, float], ...] = (
    # Blackwell. NVIDIA HGX B200 data sheet: 36 PFLOP/s sparse for 8; GB200 NVL72 data sheet: 360 for 72.
    (r"B200", 2250e12),
    (r"GB200", 2500e12),
    # NVIDIA RTX Blackwell GPU Architecture white paper, appendix A, BF16 with FP32 accumulate.
    (r"GeForce RTX 5090", 209.5e12),
    (r"GeForce RTX 5080", 112.6e12),
    # Hopper. NVIDIA H100, H200, GH200 and H20 data sheets.
    (r"H[12]00( \d+GB HBM3e?)?", 989.4e12),
    (r"GH200( \d+GB)?", 989.4e12),
    (r"H800", 989.4e12),
    (r"H[18]00 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H200 NVL", 836e12),
    (r"H20", 148e12),
    # Ada. NVIDIA L4, L40, L40S and RTX 6000 Ada data sheets; NVIDIA Ada GPU Architecture white paper.
    (r"L4", 121e12),
    (r"L40", 181e12),
    (r"L40S", 362e12),
    (r"RTX 6000 Ada Generation", 364.2e12),
    (r"GeForce RTX 4090", 165.2e12),
    (r"GeForce RTX 4080", 97.5e12),
    # Ampere. NVIDIA A100, A800, A30, A40 and A10 data sheets; NVIDIA GA102 GPU Architecture white paper.
    (r"A[18]00[ -].*(SXM4|PCIE?).*", 312e12),
    (r"A30", 165e12),
    (r"A40", 149.7e12),
    (r"A10", 125e12),
    (r"RTX A6000", 154.8e12),
    (r"GeForce RTX 3090", 71e12),
    (r"GeForce RTX 3080", 59.5e12),
    # Turing and Volta, fp16. NVIDIA T4 and V100 data sheets.
    (r"T4", 65e12),
    (r"V100-SXM2-\d+GB", 125e12),
    (r"V100-PCIE-\d+GB", 112e12),
    (r"V100S-PCIE-\d+GB", 130e12),
    # AMD Instinct MI300X data sheet.
    (r"Instinct MI300X", 1307.4e12),
)


def device_peak_flops(name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s, or None where it is not known for certain.

    Args:
        name: as `torch.cuda.get_device_name` gives it, such as `NVIDIA H100 80GB HBM3`.
    """
    name = re.sub(r"^(NVIDIA|Tesla|AMD)\s+", "", name.strip())
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name, re.IGNORECASE)), None)


def peak_flops_of(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device in FLOP/s, None where it has none that is known."""
    return device_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
