"""The device, the compute dtype and the float32 precision of a run, from what the user asked for."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

from vfmvae.training.distributed import local_rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What x86 processors call their instructions for matrix products in these.
_HALF_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; other names must be usable devices (ValueError).

    Under torchrun "auto" and "cuda" are the GPU of this process's number on its machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has no values, an absent GPU no memory
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used: {reason}; try --device cpu or --device auto"
        ) from None
    return device


def run_device(name: str) -> torch.device:
    """As `pick_device`; a CUDA device is made the current one of this process."""
    device = pick_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype that activations take beside fp32 parameters; None where they are fp32 too.

    `name` is "fp32", "bf16", "fp16" (whose gradients need loss scaling) or "auto": bf16 on CUDA, fp32
    elsewhere. ValueError for another name.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name] if name != "fp32" else None


def device_name(device: torch.device) -> str:
    """What computes, for a reader: a GPU's name, or the CPU, its vector instructions and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {capability}, {threads} thread{'s' if threads > 1 else ''}"


def slow_on_cpu(dtype: torch.dtype | None, device: torch.device) -> str | None:
    """A sentence where `dtype` is slower than float32 on this CPU, which has no instructions for it.

    None on other devices, for float32 (None too), and where that is not known.
    """
    names = _HALF_INSTRUCTIONS.get(dtype) if dtype is not None else None
    if device.type != "cpu" or names is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    # torch before 2.14 tells the width of vectors only.
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if any(found.get(name) for name in names):
        return None
    if names[0] not in found and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    return (
        f"this CPU has no instructions for {str(dtype).removeprefix('torch.')}"
        f" ({' or '.join(n.upper().replace('_', '-') for n in names)}), so this is slower than --dtype fp32"
    )


def set_precision(*, deterministic: bool) -> None:
    """Make float32 mean IEEE float32 in this process, and choose between repeatable and fastest kernels.

    float32: no TF32 in matrix products and convolutions. cuDNN's default is TF32, with 10 bits of mantissa,
    which would make an fp32 run neither exact nor comparable with one on a CPU; who wants speed has bf16.

    Args:
        deterministic: True: the same inputs give the same bits on the same device. PyTorch warns about each
            operation that has no such form, and cuBLAS asks for CUBLAS_WORKSPACE_CONFIG=:4096:8 in the
            environment. False: cuDNN times a few algorithms at the first batch of each shape and keeps the
            fastest, so runs agree to rounding only.
    """
    # The older of two families of settings: once the newer one (fp32_precision) has been used, reading
    # allow_tf32 raises, and torch.compile and others read it.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # The likely ones come first, and a step has a hundred shapes per image size.
    torch.backends.cudnn.benchmark_limit = 3
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # That also fills fresh memory with NaN, which finds reads of it but costs a pass over every result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prepare_inference(device: torch.device) -> None:
    """What commands that only use models set for their process."""
    if device.type == "cuda":
        set_precision(deterministic=True)
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for the next tensor of a step; whether that is possible.

    glibc returns large blocks to the system at once, and the system clears every page before it hands it out
    again: on a CPU that may take longer than computing what the page holds. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))
