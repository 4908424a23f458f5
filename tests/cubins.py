"""What a compiled kernel of Triton takes, by the CUDA tool that Triton brings; for scripts of their
own, which see this folder on PYTHONPATH."""

import os
import subprocess
import tempfile

import pytest
import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def need_tools():
    """Skip a test where this triton comes without."""
    for tool in ("ptxas", "cuobjdump"):
        if not os.path.exists(os.path.join(TOOLS, tool)):
            pytest.skip(f"this triton comes without {tool}")


def environment(*folders):
    """Of such a script, which compiles for a GPU."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [os.path.dirname(__file__), *folders, kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}


def spilled(kernel):
    """Bytes of memory that a thread of it has for what finds no register."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split(" STACK:")[1].split()[0])
