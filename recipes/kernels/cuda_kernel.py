"""Kernels in CUDA C++: compiled at their first use on a GPU, in seconds, by the compiler that PyTorch brings along.

Their machine code is kept in Inductor's cache folder. Packages hold that of those that they use: `used` and `provide`.

Sources: NVRTC; the CUDA driver API's module management, execution control and tensor map objects.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from utils import cuda_bindings
from utils.errors import UsageError, UserError
from utils.files import replacing

_MAPS = 4096  # kept; one a tensor's address and kind
_MAP_BYTES = 128
_FOLDER = Path(__file__).parent
_NOT_KEPT = (OSError, KeyError, UsageError)  # of a folder that can't be written to, or a user without a name
COUNTERS = 8
_counters: dict[tuple[int, int], torch.Tensor] = {}  # by device and stream; none is let go, for a graph may hold it
_code: dict[str, bytes] = {}  # machine code by CudaKernel.key
_recorders: list[set[CudaKernel]] = []


def loading_error() -> str | None:
    """Why no such kernel can be had; None if they can."""
    if cuda_bindings.installed():
        return None
    return "it is compiled by the package cuda-bindings, which comes with PyTorch's CUDA builds and isn't installed"


@dataclass(frozen=True)
class CudaKernel:
    """The kernel `name` of a source file in this folder, for one architecture ("sm_90a").

    defines: of the preprocessor. shared_bytes: of dynamic shared memory.
    """

    file: str
    name: str
    arch: str
    shared_bytes: int
    defines: tuple[tuple[str, int], ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """Its name and a hash of what its machine code is made from."""
        texts = [path.read_text() for path in (_FOLDER / self.file, *sorted(_FOLDER.glob("*.cuh")))]
        made_from = hashlib.sha256(repr((texts, self.name, self.arch, self.defines, torch.version.cuda)).encode())
        return f"{self.name}-{made_from.hexdigest()[:16]}"

    def launch(self, device: torch.device, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """On PyTorch's current stream. arguments: ctypes' objects, which are copied.

        Raises:
            MemoryError: the GPU's memory doesn't hold it.
            UserError: it couldn't be compiled, loaded or launched.
        """
        for recorder in _recorders:
            recorder.add(self)
        from cuda.bindings import driver

        with torch.cuda.device(device):
            function = _loaded(self, torch.cuda.current_device())
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
            stream = torch.cuda.current_stream().cuda_stream
            size = blocks, 1, 1, threads, 1, 1
            launch = partial(cuda_bindings.call, driver, "cuLaunchKernel", what=self.name)
            launch(function, *size, self.shared_bytes, stream, ctypes.addressof(pointers), 0)


def counters(device: torch.device) -> torch.Tensor:
    """Zeros, int32, `COUNTERS` for each multiprocessor, with which a kernel launched on the current stream may count,
    and which it has to leave as zeros: a kernel to make them so each time would take 2 us.

    A stream has its own, as its kernels run one after the other; a CUDA graph those of the stream that it was captured
    on, of which none of a pipeline's runs beside another (utils/cuda_graph.py). Two pipelines' might, if PyTorch, which
    has 32 streams, gave both the same one, and other streams replayed them at once: so one after the other.
    """
    with torch.cuda.device(device):
        key = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        if (found := _counters.get(key)) is not None:
            return found
        number = COUNTERS * torch.cuda.get_device_properties(device).multi_processor_count
        new = torch.zeros(number, device=device, dtype=torch.int32)
        if not torch.cuda.is_current_stream_capturing():  # else they are zeros at each replay, and not before
            _counters[key] = new
        return new


@functools.cache
def _loaded(kernel: CudaKernel, device: int) -> Any:
    """The function in the context of a device, the current one. None is ever let go: a CUDA graph may hold it."""
    from cuda.bindings import driver

    call = partial(cuda_bindings.call, driver, what=kernel.name)
    torch.cuda.current_stream()  # there is a context
    (module,) = call("cuModuleLoadData", machine_code(kernel))
    (function,) = call("cuModuleGetFunction", module, kernel.name.encode())
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call("cuFuncSetAttribute", function, limit, kernel.shared_bytes)
    return function


@contextmanager
def used() -> Iterator[set[CudaKernel]]:
    """The kernels that the body launches."""
    recorder: set[CudaKernel] = set()
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders[:] = [other for other in _recorders if other is not recorder]


def provide(code: Mapping[str, bytes]) -> None:
    """Machine code by `CudaKernel.key`, which then needn't be compiled. It is native code: check where it is from."""
    for key, machine_code in code.items():
        _code.setdefault(key, machine_code)


def machine_code(kernel: CudaKernel) -> bytes:
    """What was provided or compiled before, by whatever process; else it is compiled.

    Raises:
        UserError: it doesn't compile; with the compiler's first error.
    """
    if kernel.key not in _code:
        code = _kept(kernel)
        if code is None:
            code = _compiled(kernel)
            with suppress(*_NOT_KEPT), replacing(_place(kernel)) as path:
                path.write_bytes(hashlib.sha256(code).digest() + code)
        _code[kernel.key] = code
    return _code[kernel.key]


def _kept(kernel: CudaKernel) -> bytes | None:
    """What another process has compiled; None also of a file that is damaged."""
    with suppress(*_NOT_KEPT):
        content = _place(kernel).read_bytes()
        code = content[hashlib.sha256().digest_size :]
        if content == hashlib.sha256(code).digest() + code:
            return code
    return None


def _place(kernel: CudaKernel) -> Path:
    """Where its machine code is kept behind its hash, in a folder that is there."""
    folder = Path(cache_dir()) / "flux_fast"
    folder.mkdir(exist_ok=True)
    return folder / kernel.key


def _compiled(kernel: CudaKernel) -> bytes:
    """Its machine code.

    Raises:
        UserError: it doesn't compile; with the compiler's first error.
    """
    from cuda.bindings import nvrtc

    call = partial(cuda_bindings.call, nvrtc, what=kernel.name)
    source = (_FOLDER / kernel.file).read_bytes()
    (program,) = call("nvrtcCreateProgram", source, kernel.file.encode(), 0, [], [])
    options = [f"--gpu-architecture={kernel.arch}", "--std=c++17", f"--include-path={_FOLDER}"]
    options += [f"-D{name}={n}" for name, n in kernel.defines]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status.value != 0:
            (size,) = call("nvrtcGetProgramLogSize", program)
            log = bytearray(size)
            call("nvrtcGetProgramLog", program, log)
            lines = log.decode(errors="replace").strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0])  # warnings may stand before it
            raise UserError(f"{kernel.file} doesn't compile: {first}")
        (size,) = call("nvrtcGetCUBINSize", program)
        code = bytearray(size)
        call("nvrtcGetCUBIN", program, code)
    finally:
        call("nvrtcDestroyProgram", program)
    return bytes(code)


@functools.lru_cache(_MAPS)
def tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> ctypes.Array[ctypes.c_char]:
    """How TMA reads boxes of bytes from a tensor: rows of 128 bytes, swizzled; what lies outside of it is zeros.

    sizes and box from the innermost dimension on, in bytes; strides of all but that one, multiples of 16.

    Raises:
        UserError: there is no such map.
    """
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8
    (made,) = cuda_bindings.call(
        driver, "cuTensorMapEncodeTiled", kind, len(sizes), address,
        [driver.cuuint64_t(size) for size in sizes], [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(side) for side in box], [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        what="tensor map",
    )  # fmt: skip
    return (ctypes.c_char * _MAP_BYTES).from_buffer_copy(ctypes.string_at(made.getPtr(), _MAP_BYTES))
