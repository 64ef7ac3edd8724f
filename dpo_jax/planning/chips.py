"""Accelerators as data: what the makers say they can do, and what of it is taken as reached."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device of a mesh.

    Attributes:
      name: as `--chip` takes it.
      title: as it is printed.
      flops: peak of dense bfloat16 products, operations per second.
      memory: bytes of HBM.
      memory_bandwidth: bytes per second.
      inside: bytes per second that leave a device (and as many enter) towards the others of its host or ICI domain.
      across: the same towards other hosts or domains, a device's share of its host's network cards.
      domain: most devices that `inside` joins.
    """

    name: str
    title: str
    flops: float
    memory: float
    memory_bandwidth: float
    inside: float
    across: float
    domain: int


CHIPS = {
    chip.name: chip
    for chip in (
        # H100 SXM datasheet: 1,979 TFLOP/s with sparsity, 80 GB at 3.35 TB/s, NVLink 900 GB/s in both directions
        # together. Across: DGX H100 has one 400 Gb/s card (ConnectX-7) for each GPU.
        Chip("h100", "H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8),
        # H200 datasheet: the same chip with 141 GB at 4.8 TB/s; DGX H200's network is DGX H100's.
        Chip("h200", "H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8),
        # HGX B200: 4.5 PFLOP/s with sparsity, NVLink 1.8 TB/s in both directions; DGX B200: 1,440 GB and 64 TB/s for 8,
        # one 400 Gb/s card for each GPU.
        Chip("b200", "B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 8),
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, ICI 400 GB/s in both directions together,
        # 256 chips a pod with 6.4 Tb/s of data centre network.
        Chip("v5e", "TPU v5e", 197e12, 16e9, 819e9, 200e9, 6.4e12 / 8 / 256, 256),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB at 2,765 GB/s, ICI 1,200 GB/s in both directions
        # together, network 50 Gb/s a chip, slices of at most 6,144 chips.
        Chip("v5p", "TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 50e9 / 8, 6144),
        # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1,600 GB/s, ICI 800 GB/s in both directions
        # together, 256 chips a pod with 25.6 Tb/s of data centre network.
        Chip("v6e", "TPU v6e", 918e12, 32e9, 1600e9, 400e9, 25.6e12 / 8 / 256, 256),
    )
}

# A share of each peak that well-written programs reach, not what this one was measured to reach.
REACHED_FLOPS = 0.7  # an H100 was measured at 798 of its 989 TFLOP/s in one large product; smaller ones reach less
REACHED_BANDWIDTH = 0.8
