# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`accelerate launch` with the files of `accelerate_configs/`, on this machine's CPUs."""

import atexit
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


ROOT = Path(__file__).parent.parent


def let_gloo_go_at_exit():
    """
    Gloo's threads that still hold a tensor when Python goes down abort the process ("terminate called without an
    active exception", pytorch#179291): a moment with the GIL free, and they have let go.
    """
    atexit.register(time.sleep, 0.5)


def start_on_cpu():
    """accelerate has no DeepSpeed and no FSDP without an accelerator, but takes up what it finds started."""
    let_gloo_go_at_exit()
    deepspeed, fsdp = (os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("DEEPSPEED", "FSDP"))
    if not deepspeed and not fsdp:
        return {"use_cpu": True}
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if deepspeed:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__.clear()  # or it compiles its own communication, for which it needs a compiler
    PartialState(backend="gloo")
    if fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def free_port():
    """
    One that nobody listens on. It is below those that systems hand out by themselves, so that no connection of anybody
    takes it before the processes that it is for have started.
    """
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among a hundred")


def launch(config, script, *arguments, timeout=600, **options):
    """`accelerate launch` with a file of `accelerate_configs/`, in two processes and full precision."""
    options = {"num_processes": 2, "mixed_precision": "no", "main_process_port": free_port(), **options}
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += [str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
