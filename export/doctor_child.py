"""What `doctor` runs in a process of its own: `python -m export.doctor_child FOLDER DEVICE`, one word for each step."""

from __future__ import annotations

import sys

import torch


def main(folder: str, device: str) -> None:
    module = torch.nn.Linear(8, 8, device=device).requires_grad_(False)
    x = torch.randn(4, 8, device=device)
    exported = torch.export.export(module, (x,), strict=False)
    print("exported", flush=True)
    settings = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=f"{folder}/package.pt2", inductor_configs=settings
    )
    print("compiled", flush=True)
    package = torch._inductor.aoti_load_package(path, run_single_threaded=True)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    package.load_constants(weights, check_full_update=True, user_managed=True)
    print("loaded", flush=True)
    y = package(x)
    print("ran", flush=True)
    torch.testing.assert_close(y, module(x), atol=1e-2, rtol=1e-2)
    print("right", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
