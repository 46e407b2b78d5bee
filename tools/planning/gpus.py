"""GPUs by the vendor's data sheets, and what XLA's compiler has to know of them.

`target` writes a `stream_executor.GpuTargetConfigProto` in text form, from which the compiler
builds a topology without a GPU. Limits of a compute capability are those of the CUDA C++
programming guide, table "Technical Specifications per Compute Capability"; the memory that a
device reports is that of openxla/xla, xla/backends/gpu/target_config/specs, where it is there.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU. FLOPs are dense; links are one way, all of a device's together."""

    name: str
    memory: int  # bytes
    flops: float  # bfloat16 with float32 sums, a second
    memory_rate: float  # bytes a second
    link: float  # bytes a second to the other GPUs of a host: NVLink, or PCIe
    network: float  # bytes a second to other hosts, a device's share
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock: float  # GHz
    cache: int  # bytes of L2
    source: str


class Capability(NamedTuple):
    """Limits of a multiprocessor: bytes of shared memory (of it, of a block that asks for more
    than 48 KiB), threads, and float32 units."""

    shared: int
    shared_block: int
    threads: int
    units: int


MIB, GIB = 2**20, 2**30
CAPABILITIES = {
    (8, 0): Capability(167_936, 166_912, 2048, 64),
    (8, 6): Capability(102_400, 101_376, 1536, 128),
    (8, 9): Capability(102_400, 101_376, 1536, 128),
    (9, 0): Capability(233_472, 232_448, 2048, 128),
    (10, 0): Capability(233_472, 232_448, 2048, 128),
    (12, 0): Capability(131_072, 101_376, 1536, 128),
}
ACCELERATED = ((9, 0), (10, 0))  # capabilities whose own instructions (sm_90a) are used

# Networks: of a DGX A100 200 Gb/s a GPU, of DGX H100, H200 and B200 400 Gb/s, of Google Cloud's
# largest G2 host 100 Gb/s for eight L4; for cards in workstations 100 Gb/s for eight.
SHEET = "NVIDIA {} data sheet"
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 42_481_549_312, 312e12, 1555e9, 300e9, 25e9, (8, 0),
                   108, 1.41, 40 * MIB, SHEET.format("A100")),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864, 312e12, 2039e9, 300e9, 25e9, (8, 0),
                   108, 1.41, 40 * MIB, SHEET.format("A100")),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 989e12, 3352e9, 450e9, 50e9, (9, 0),
                132, 1.98, 50 * MIB, SHEET.format("H100 SXM")),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 989e12, 4800e9, 450e9, 50e9, (9, 0),
                132, 1.98, 50 * MIB, SHEET.format("H200 SXM")),
    "b200": Gpu("NVIDIA B200", 191_514_411_008, 2250e12, 7672e9, 900e9, 50e9, (10, 0),
                148, 1.965, 132_644_864, SHEET.format("DGX B200")),
    "l4": Gpu("NVIDIA L4", 23_034 * MIB, 121e12, 300e9, 32e9, 1.56e9, (8, 9),
              58, 2.04, 48 * MIB, SHEET.format("L4")),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24_564 * MIB, 165e12, 1008e9, 32e9, 1.56e9, (8, 9),
                   128, 2.52, 72 * MIB, "NVIDIA Ada GPU architecture white paper"),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 32_607 * MIB, 209e12, 1792e9, 64e9, 1.56e9, (12, 0),
                   170, 2.407, 96 * MIB, "NVIDIA RTX Blackwell GPU architecture white paper"),
    "rtx6000pro": Gpu("NVIDIA RTX PRO 6000 Blackwell", 96 * GIB, 504e12, 1792e9, 64e9, 1.56e9,
                      (12, 0), 188, 2.6, 128 * MIB,
                      "NVIDIA RTX PRO Blackwell GPU architecture white paper"),
}  # fmt: skip
HOST = (1, 2, 4, 8)  # GPUs of a host


def target(gpu: Gpu) -> str:
    """The text of a GpuTargetConfigProto."""
    limits, (major, minor) = CAPABILITIES[gpu.capability], gpu.capability
    feature = "ACCELERATED_FEATURES" if gpu.capability in ACCELERATED else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {limits.shared}
  shared_memory_per_block_optin: {limits.shared_block}
  threads_per_core_limit: {limits.threads}
  core_count: {gpu.cores}
  fpus_per_core: {limits.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {gpu.memory_rate:.0f}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
