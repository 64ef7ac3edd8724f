"""Accelerators as data: what the makers say they can do, and what of it is taken as reached."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """What XLA's compiler asks of an NVIDIA GPU.

    Attributes:
      title: its full name.
      capability: compute capability; `accelerated` if the compiler may use what only this one has.
      cores: streaming multiprocessors, each with `fpus` units for float32, at most `threads` threads, and so many bytes
        of `shared_memory`.
      clock: in hertz.
      memory: bytes, with `bandwidth` in bytes per second behind `cache` bytes of L2.
    """

    title: str
    capability: float
    accelerated: bool
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    clock: float
    memory: int
    bandwidth: float
    cache: int

    @property
    def float32(self) -> float:
        """Peak of float32 products without matrix units, operations per second."""
        return 2.0 * self.cores * self.fpus * self.clock


class Tpu(NamedTuple):
    """What a TPU is to its compiler.

    Attributes:
      name: of its topologies.
      flat: a slice is a torus of two axes, not of three.
      cores: devices of a chip, as JAX counts them.
      clock: in hertz: what peak and size of the matrix units come to.
    """

    name: str
    flat: bool
    cores: int
    clock: float


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
      compiler: what its compiler is told.
    """

    name: str
    title: str
    flops: float
    memory: float
    memory_bandwidth: float
    inside: float
    across: float
    domain: int
    compiler: Gpu | Tpu

    @property
    def platform(self) -> str:
        """As JAX names it: gpu or tpu."""
        return "gpu" if isinstance(self.compiler, Gpu) else "tpu"


# Facts of NVIDIA GPUs for XLA are those of its own target configurations (xla/backends/gpu/target_config/specs); of the
# L4, which has none there, those of its datasheet and of the Ada architecture's whitepaper.
_H100 = Gpu("NVIDIA H100 80GB HBM3", 9.0, True, 132, 128, 2048, 233472, 1.98e9, 84942979072, 3.35232e12, 52428800)
_H200 = Gpu("NVIDIA H200 141GB HBM3e", 9.0, True, 132, 128, 2048, 233472, 1.98e9, 151397597184, 4.8e12, 52428800)
_B200 = Gpu("NVIDIA B200", 10.0, True, 148, 128, 2048, 233472, 1.965e9, 191514411008, 7.67232e12, 132644864)
_A100 = Gpu("NVIDIA A100-SXM4-80GB", 8.0, False, 108, 64, 2048, 167936, 1.41e9, 85100068864, 2.03904e12, 41943040)
_A6000 = Gpu("NVIDIA RTX A6000", 8.6, False, 84, 128, 1536, 102400, 1.8e9, 51041271808, 7.68096e11, 6291456)
_L4 = Gpu("NVIDIA L4", 8.9, False, 58, 128, 1536, 102400, 2.04e9, 24 * 10**9, 3e11, 50331648)

CHIPS = {
    chip.name: chip
    for chip in (
        # H100 SXM datasheet: 1,979 TFLOP/s with sparsity, 80 GB at 3.35 TB/s, NVLink 900 GB/s in both directions
        # together. Across: DGX H100 has one 400 Gb/s card (ConnectX-7) for each GPU.
        Chip("h100", "H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8, _H100),
        # H200 datasheet: the same chip with 141 GB at 4.8 TB/s; DGX H200's network is DGX H100's.
        Chip("h200", "H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8, _H200),
        # HGX B200: 4.5 PFLOP/s with sparsity, NVLink 1.8 TB/s in both directions; DGX B200: 1,440 GB and 64 TB/s for 8,
        # one 400 Gb/s card for each GPU.
        Chip("b200", "B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 8, _B200),
        # A100 80GB SXM datasheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s in both directions; DGX A100: one 200 Gb/s
        # card for each GPU.
        Chip("a100", "A100 SXM 80GB", 312e12, 80e9, 2.039e12, 300e9, 25e9, 8, _A100),
        # RTX A6000 datasheet: 309.7 TFLOP/s with sparsity, 48 GB at 768 GB/s, PCIe 4.0 x16 (64 GB/s both ways).
        # Across: a share of one 100 Gb/s card for 4.
        Chip("a6000", "RTX A6000", 154.8e12, 48e9, 768e9, 32e9, 3.1e9, 8, _A6000),
        # L4 datasheet: 242 TFLOP/s with sparsity, 24 GB at 300 GB/s, PCIe 4.0 x16; Google Cloud's g2-standard-96 has 8
        # with 100 Gb/s.
        Chip("l4", "L4", 121e12, 24e9, 300e9, 32e9, 100e9 / 8 / 8, 8, _L4),
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, ICI 400 GB/s in both directions together,
        # 256 chips a pod with 6.4 Tb/s of data centre network.
        Chip("v5e", "TPU v5e", 197e12, 16e9, 819e9, 200e9, 6.4e12 / 8 / 256, 256, Tpu("v5e", True, 1, 1.5e9)),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB at 2,765 GB/s, ICI 1,200 GB/s in both directions
        # together, network 50 Gb/s a chip, slices of at most 6,144 chips.
        Chip("v5p", "TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 50e9 / 8, 6144, Tpu("v5p", False, 1, 1.75e9)),
        # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1,600 GB/s, ICI 800 GB/s in both directions
        # together, 256 chips a pod with 25.6 Tb/s of data centre network.
        Chip("v6e", "TPU v6e", 918e12, 32e9, 1600e9, 400e9, 25.6e12 / 8 / 256, 256, Tpu("v6e", True, 1, 1.75e9)),
        # docs.cloud.google.com/tpu/docs/tpu7x: a chip is two devices, and has 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, ICI
        # 1,200 GB/s in both directions together; network 100 Gb/s a chip. Here is half of it.
        Chip(
            "tpu7x", "TPU7x", 1153.5e12, 96 * 2**30, 3690e9, 300e9, 100e9 / 8 / 2, 9216, Tpu("tpu7x", False, 2, 2.2e9)
        ),
    )
}

# A share of each peak that well-written programs reach, not what this one was measured to reach.
REACHED_FLOPS = 0.7  # an H100 was measured at 798 of its 989 TFLOP/s in one large product; smaller ones reach less
REACHED_BANDWIDTH = 0.8
REACHED_ATTENTION = 0.35  # kernels of attention on packed rows of about a thousand tokens, forwards and backwards
